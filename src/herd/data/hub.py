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
from .sources import JSON_LINES, PACKED, Document, read_file, row_document

KINDS = (JSON_LINES, (".parquet",), (".txt", ".md"))
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
            f"hf:{name}: no .jsonl, .parquet or .txt among its {len(files)} files; choose another data set"
        )
    for file in chosen:
        try:
            local = hub.hf_hub_download(repo, file, repo_type="dataset")
        except Exception as error:
            raise _unreachable(repo, error) from None
        source = f"hf:{repo}/{file}"
        if file.endswith(".parquet"):
            yield from read_parquet(Path(local), source)
        else:
            yield from read_file(Path(local), source=source)


def choose(files: list[str], part: str = "") -> list[str]:
    """The files to read: those under ``part``, of the best kind present, training files where any is called so."""
    files = sorted(file for file in files if part in file and not file.startswith("."))
    for endings in KINDS:
        kind = [file for file in files if file.endswith(tuple(e + p for e in endings for p in ("", *PACKED)))]
        if kind:
            return [file for file in kind if "train" in file.lower()] or kind
    return []


def read_parquet(file: Path, source: str) -> Iterator[Document]:
    """Documents of a Parquet file, a row group at a time."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{source}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:
        raise DataError(f"{source}: not a Parquet file ({error}); download it again") from None
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield row_document(row, f"{source}: row {number}", f"{source}@{number:07d}")
            number += 1


def _unreachable(repo: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"hf:{repo}: cannot be read from the Hugging Face hub ({reason}); check the name and the network"
    )
