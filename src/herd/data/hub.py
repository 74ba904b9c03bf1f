"""``hf:NAME``: a data set of the Hugging Face hub, read file by file, never wholly downloaded unless wholly read.

``hf:owner/name`` takes the data set's training files; ``hf:owner/name:folder`` only those whose path contains
``folder`` (a configuration or a split). Rows come from JSON lines, text, or Parquet (for which ``pyarrow`` must be
installed); the field is ``text`` or ``content``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .rows import JSON_LINES
from .sources import Document, read_file
from .text_files import COMPRESSED

KINDS = (JSON_LINES, (".parquet",), (".json", ".csv"), (".txt", ".md"))
"""What is read, best first: the first kind present in the data set is taken."""


def read_hub(name: str) -> Iterator[Document]:
    """Documents of the data set ``owner/name`` or ``owner/name:folder``; DataError offline or where nothing fits."""
    repo, _, part = name.partition(":")
    hub = importlib.import_module("huggingface_hub")
    try:
        files = hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:
        raise _unreachable(repo, error) from None
    chosen = choose(files, part)
    if not chosen:
        raise DataError(
            f"hf:{name}: no .jsonl, .parquet, .json, .csv or .txt among its {len(files)} files; choose another data set"
        )
    for file in chosen:
        try:
            local = hub.hf_hub_download(repo, file, repo_type="dataset")
        except Exception as error:
            raise _unreachable(repo, error) from None
        source = f"hf:{repo}/{file}"
        yield from read_file(Path(local), source=source)


def choose(files: list[str], part: str = "") -> list[str]:
    """The files to read: those under ``part``, of the best kind present, training files where any is called so."""
    files = sorted(file for file in files if part in file and not file.startswith("."))
    for endings in KINDS:
        kind = [
            file for file in files if file.endswith(tuple(e + p for e in endings for p in ("", *COMPRESSED)))
        ]
        if kind:
            return [file for file in kind if "train" in file.lower()] or kind
    return []


def _unreachable(repo: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"hf:{repo}: cannot be read from the Hugging Face hub ({reason}); check the name and the network"
    )
