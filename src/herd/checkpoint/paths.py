"""Know which files belong to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from . import gguf, lineage

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED_ADAPTER = "adapter_model.bin"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md", "NOTICE", "NOTICE.txt")
SIDE_FILES = (GENERATION, *LICENCE_FILES)
"""Files that every import and export copies byte for byte, whatever becomes of weights and tokenizer."""
KEPT_FILES = (*TOKENIZER_FILES, "added_tokens.json", *TEMPLATE_FILES, *SIDE_FILES)
"""The same, if weights and tokenizer stay in Hugging Face's layout."""
LFS_POINTER = b"version https://git-lfs"
"""The beginning of the file that git leaves in place of a large one."""
FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_KNOWN_FILES = {CONFIG, lineage.FILE, INDEX, gguf.FILE, "README.md", ".gitattributes"}
_KNOWN_FILES |= {name.split("/")[0] for name in KEPT_FILES}


def read_kept(folder: Path, names: tuple[str, ...], notice: str | None = None) -> dict[str, bytes]:
    """Return the contents of the files that exist in ``folder``. None exists if it is a single file.

    ``notice`` is the content of the file NOTICE, if the folder does not have this file.
    """
    kept = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return kept if notice is None else {"NOTICE": f"{notice}\n".encode()} | kept


def write_kept(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files that `read_kept` has read."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def require_replaceable(folder: Path, *sources: Path) -> None:
    """Raise `CheckpointError` for a folder with anything but a checkpoint, such as a home folder.

    The same for the folder of a model that is read (``sources``), and for a name that only files have, such
    as ``model.gguf``.
    """
    for source in sources:
        if folder.resolve() in (source.resolve(), source.resolve().parent):
            raise CheckpointError(f"{folder}: contains the model that is being read; choose another folder")
    if not folder.exists():
        if folder.suffix.lower() in FILE_ENDINGS:
            cure = "choose another name, or let herd export write one GGUF file"
            raise CheckpointError(f"{folder}: is the name of a file, and a folder is written; {cure}")
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; choose another name")
    others = sorted(
        p.name for p in folder.iterdir() if p.name not in _KNOWN_FILES and p.suffix != ".safetensors"
    )
    if others:
        raise CheckpointError(f"{folder}: holds {others[0]}, not only a checkpoint; choose another folder")
