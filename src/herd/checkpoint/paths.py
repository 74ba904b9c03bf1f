"""Know which files belong to a checkpoint folder."""

from __future__ import annotations

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
