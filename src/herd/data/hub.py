"""``hf:NAME``: a data set of the Hugging Face hub, downloaded file by file as it is read.

``hf:owner/name`` takes the data set's training files; ``hf:owner/name:folder`` only those whose path contains
``folder`` (a configuration or a split). Rows come from JSON lines, Parquet (which needs
``pyarrow``), JSON or CSV, in a field ``text`` or ``content``; text files are read whole.
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
"""Endings of the files that are read, best first: the first kind that the data set has is taken."""


def read_hub(name: str) -> Iterator[Document]:
    """Yield the documents of ``owner/name`` or ``owner/name:folder``. DataError offline or without text."""
    repo, _, part = name.partition(":")
    hub = importlib.import_module("huggingface_hub")
    try:
        files = hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:
        raise _unreachable(repo, error) from None
    chosen = choose_files(files, part)
    if not chosen:
        known = ".jsonl, .parquet, .json, .csv or .txt"
        raise DataError(f"hf:{name}: no {known} among its {len(files)} files; choose another data set")
    for file in chosen:
        try:
            local = hub.hf_hub_download(repo, file, repo_type="dataset")
        except Exception as error:
            raise _unreachable(repo, error) from None
        yield from read_file(Path(local), source=f"hf:{repo}/{file}")


def choose_files(files: list[str], part: str = "") -> list[str]:
    """Return the files to read: of the best kind with ``part`` in their path; only "train" files if there
    are any.
    """
    files = sorted(file for file in files if part in file and not file.startswith("."))
    for endings in KINDS:
        wanted = tuple(ending + packed for ending in endings for packed in ("", *COMPRESSED))
        kind = [file for file in files if file.endswith(wanted)]
        if kind:
            return [file for file in kind if "train" in file.lower()] or kind
    return []


def _unreachable(repo: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"hf:{repo}: cannot be read from the Hugging Face hub ({reason}); check the name and the network"
    )
