"""Find the folder or file a user names, and know what belongs to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from . import gguf, lineage, weights

CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE")
KEPT_FILES = (*TOKENIZER_FILES, "chat_template.jinja", GENERATION, *LICENCE_FILES)
"""Files of a release that an import or export copies byte for byte."""
_KNOWN_FILES = {CONFIG, lineage.FILE, weights.INDEX, gguf.FILE, "README.md", ".gitattributes", *KEPT_FILES}
_FROM_THE_HUB = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*"]


def resolve_folder(source: str | Path) -> Path:
    """Return a folder on disk: ``source`` itself, or the download of ``hf:ORG/NAME[@REVISION]``."""
    if not str(source).startswith("hf:"):
        if Path(source).suffix == ".gguf" and Path(source).is_file():
            raise CheckpointError(f"{source}: is a file; make a folder of it: herd import {source} FOLDER")
        if not Path(source).is_dir():
            raise CheckpointError(f"{source}: no such folder; give a checkpoint folder or hf:ORG/NAME")
        if (Path(source) / ADAPTER).exists() and not (Path(source) / CONFIG).exists():
            raise CheckpointError(
                f"{source}: holds only an adapter ({ADAPTER}) and not the model it changes; merge it into "
                "its base model with peft (merge_and_unload) and give the result"
            )
        return Path(source)
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    name, _, revision = str(source)[3:].partition("@")
    with _hub_errors(source):
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=_FROM_THE_HUB,
                ignore_patterns=["original/*"],
            )
        )


def resolve_file(source: str | Path) -> Path:
    """Return a file on disk: ``source`` itself, or the download of ``hf:ORG/NAME/FILE[@REVISION]``."""
    if not str(source).startswith("hf:"):
        return Path(source)
    from huggingface_hub import hf_hub_download

    name, _, revision = str(source)[3:].partition("@")
    parts = name.split("/", 2)
    if len(parts) < 3:
        raise CheckpointError(f"{source}: say which file: hf:ORG/NAME/FILE.gguf")
    with _hub_errors(source):
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], revision=revision or None))


def require_replaceable(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that holds anything but a checkpoint, such as a home folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; choose another name")
    others = sorted(
        p.name for p in folder.iterdir() if p.name not in _KNOWN_FILES and p.suffix != ".safetensors"
    )
    if others:
        raise CheckpointError(f"{folder}: holds {others[0]}, not only a checkpoint; choose another folder")


@contextmanager
def _hub_errors(source: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub raises its own, httpx's and OSError alike; all mean "not there"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: cannot be fetched: {reason}") from error
