"""Read a data set of the Hugging Face hub (``hf:NAME``), downloading one file after the other.

``hf:owner/name`` takes the data set's training files, ``hf:owner/name:folder`` only those whose path contains
``folder`` (a configuration or a split). Rows come from JSON lines, Parquet (which needs ``pyarrow``), JSON or
CSV, in a field ``text`` or ``content``. A text file is one document.
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
"""Endings of the files that can be read, best first. The first kind in the data set is taken."""


def read_hub(name: str) -> Iterator[Document]:
    """Yield the documents of ``owner/name[:folder]``. Raises DataError offline and if there is no text."""
    repo, _, part = name.partition(":")
    hub = importlib.import_module("huggingface_hub")
    try:
        files = hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:
        raise unreachable(repo, error) from None
    chosen = choose_files(files, part)
    if not chosen:
        known = ".jsonl, .parquet, .json, .csv or .txt"
        raise DataError(f"hf:{name}: no {known} among its {len(files)} files; choose another data set")
    for file in chosen:
        try:
            local = hub.hf_hub_download(repo, file, repo_type="dataset")
        except Exception as error:
            raise unreachable(repo, error) from None
        yield from read_file(Path(local), source=f"hf:{repo}/{file}")


def choose_files(files: list[str], part: str = "") -> list[str]:
    """Return the files of the best kind with ``part`` in their paths, preferring "train" files."""
    files = sorted(file for file in files if part in file and not file.startswith("."))
    for endings in KINDS:
        all_endings = tuple(ending + packed for ending in endings for packed in ("", *COMPRESSED))
        readable = [file for file in files if file.endswith(all_endings)]
        if readable:
            return [file for file in readable if "train" in file.lower()] or readable
    return []


def unreachable(repo: str, error: Exception) -> DataError:
    """Return the one-line error for a data set that cannot be read."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"hf:{repo}: cannot be read from the Hugging Face hub ({reason}); check the name and the network"
    )
