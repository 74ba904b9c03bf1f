"""Models by name (`models.yaml`), and the models that are already on this disk.

Other programs keep models too: Hugging Face's cache, Ollama's blobs, LM Studio's folder. `local_models` finds
those of the Llama architecture there, which are opened in place, without a copy.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import CheckpointError
from ..machine import cache_folder
from ..package_yaml import package_yaml
from .gguf import MAGIC, gguf_parts

_ARCHITECTURE = b"general.architecture"


class NamedModel(BaseModel):
    """An entry of `models.yaml`, which explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    about: str
    licence: str
    gb: float = Field(gt=0)
    gated: bool = False
    sha256: str | None = None
    aliases: tuple[str, ...] = ()
    sampling: dict[Literal["temperature", "top_p", "top_k", "min_p", "repetition_penalty"], float] = {}


@dataclass(frozen=True)
class LocalModel:
    """A model on this disk: the name to type, the program that put it there, its path and bytes."""

    name: str
    kept_by: str
    path: Path
    nbytes: int


@cache
def catalogue() -> dict[str, NamedModel]:
    """Return the named models in the order of `models.yaml`."""
    entries = package_yaml(__package__, "models.yaml")
    return {name: NamedModel.model_validate(entry) for name, entry in entries.items()}


def find_name(name: str) -> tuple[str, NamedModel] | None:
    """Return the entry with this name or alias, ignoring case. None if there is none."""
    wanted = name.lower()
    for full, entry in catalogue().items():
        if wanted == full or wanted in entry.aliases:
            return full, entry
    return None


def find_entry(typed: str, path: Path) -> NamedModel | None:
    """Return the entry of a model that was ``typed`` and is at ``path``.

    None if neither the name nor the name of the file is in the catalogue.
    """
    named = find_name(typed)
    if named is not None and not Path(typed).exists():
        return named[1]
    return next((each for each in catalogue().values() if path.name == Path(each.source).name), None)


def unknown_name(name: str) -> CheckpointError:
    """Return the error for a name that is neither a path nor in the catalogue, with similar names."""
    known = [full for name_, entry in catalogue().items() for full in (name_, *entry.aliases)]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return CheckpointError(
        f"{name}: no such file, folder or model name; {hint}`herd list` shows the names; "
        "hf:ORG/NAME takes any repository of the hub"
    )


def pulled_folder() -> Path:
    """Return the folder of files that `herd pull` unpacked itself (the hub's are in Hugging Face's cache)."""
    return cache_folder() / "models"


def hub_cache() -> Path:
    """Return the folder in which Hugging Face's programs keep what they download."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def local_models() -> list[LocalModel]:
    """Return the models of the Llama architecture on this disk, first those from `herd pull`."""
    found = [*_pulled(), *_hugging_face(), *_ollama(), *_lm_studio()]
    by_path = {model.path.resolve(): model for model in reversed(found)}
    return [model for model in found if by_path[model.path.resolve()] is model]


def _pulled() -> Iterator[LocalModel]:
    for path in sorted(pulled_folder().glob("*/*.gguf")):
        yield LocalModel(path.parent.name, "herd", path, path.stat().st_size)


def _hugging_face() -> Iterator[LocalModel]:
    for repository in sorted(hub_cache().glob("models--*--*")):
        name = "hf:" + "/".join(repository.name.split("--")[1:])
        snapshots = sorted((repository / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        for snapshot in snapshots[-1:]:
            for path in _gguf_files(snapshot, "**/*.gguf"):
                yield LocalModel(f"{name}/{path.relative_to(snapshot)}", "Hugging Face", path, _nbytes(path))
            weights = sorted(snapshot.glob("*.safetensors"))
            if weights and all(path.exists() for path in weights) and _is_llama(snapshot / "config.json"):
                yield LocalModel(name, "Hugging Face", snapshot, sum(path.stat().st_size for path in weights))


def _ollama() -> Iterator[LocalModel]:
    root = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    for manifest in sorted(path for path in (root / "manifests").rglob("*") if path.is_file()):
        with suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
            layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
            layer = next(x for x in layers if x["mediaType"] == "application/vnd.ollama.image.model")
            blob = root / "blobs" / layer["digest"].replace(":", "-")
            if _is_llama_gguf(blob):
                *path, tag = manifest.relative_to(root / "manifests").parts[1:]
                name = "/".join(path).removeprefix("library/")
                yield LocalModel(f"ollama:{name}:{tag}", "Ollama", blob, blob.stat().st_size)


def _lm_studio() -> Iterator[LocalModel]:
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        for path in _gguf_files(root, "*/*/*.gguf"):
            yield LocalModel(str(path), "LM Studio", path, _nbytes(path))


def _gguf_files(folder: Path, pattern: str) -> list[Path]:
    """Return the GGUF files of Llamas in ``folder``. Of a complete split file it has the first part only."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and path == gguf_parts(path)[0])
    return [path for path in found if all(p.is_file() for p in gguf_parts(path)) and _is_llama_gguf(path)]


def _nbytes(path: Path) -> int:
    return sum(part.stat().st_size for part in gguf_parts(path))


def _is_llama_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF of architecture "llama", without reading all of its metadata."""
    with suppress(OSError, IndexError):
        with path.open("rb") as file:
            head = file.read(4096)
        value = head.partition(_ARCHITECTURE)[2][4 + 8 :]  # after its type and its length
        is_llama = value.startswith(b"llama") and not value.startswith(b"llama4")
        return head[:4] == MAGIC and (is_llama or not value)
    return False


def _is_llama(config: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "llama"
    return False
