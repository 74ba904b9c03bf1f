"""Read rows of a data set's file: JSON lines, a JSON array, CSV and TSV with a header, Parquet.

A row is a JSON value. Both texts and dialogs are read from rows, so both can be in any of these formats,
compressed or not.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .text_files import NotText, decode_blocks, decode_lines, file_ending, open_bytes

JSON_LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
ROW_ENDINGS = (*JSON_LINES, ".json", *TABLES, ".parquet")
LISTS = ("data", "rows", "train", "examples", "documents")
"""Keys under which a JSON object may have its list of rows."""


class NoRows(NotText):
    """A file without rows, or no list of them: an error if the user named it, skipped in a folder."""

    why = "no rows with text"


@dataclass(frozen=True)
class DataRow:
    """A row of a data set's file: value, number, and location (``FILE:LINE`` or ``FILE: row N``)."""

    value: Any
    number: int
    where: str


def read_rows(file: Path, name: str, bad: list[tuple[str, str]] | None = None) -> Iterator[DataRow]:
    """Yield the rows of a file by its ending (one of `ROW_ENDINGS`). ``name`` is its name in errors.

    Lines that are not JSON are added to ``bad`` (location, reason) if it is a list. Otherwise they are
    errors. Raises DataError for a line or row that cannot be read, NotText for an encoding other than UTF-8,
    and NoRows if there are no rows.
    """
    ending = file_ending(file)
    if ending == ".parquet":
        yield from _parquet(file, name)
        return
    with open_bytes(file) as stream:
        if ending in TABLES:
            yield from _table(decode_lines(stream, name), name, TABLES[ending])
        elif ending == ".json":
            yield from _json("".join(decode_blocks(stream, name)), name)
        else:
            yield from _json_lines(decode_lines(stream, name), name, bad)


def _json_lines(
    lines: Iterator[str], name: str, bad: list[tuple[str, str]] | None = None
) -> Iterator[DataRow]:
    empty = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        empty = False
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if bad is not None:
                bad.append((f"{name}:{number}", f"not JSON ({error})"))
                continue
            raise DataError(f"{name}:{number}: not JSON ({error}); give one JSON object per line") from None
        yield DataRow(value, number, f"{name}:{number}")
    if empty:
        raise NoRows(f"{name}: empty file; give one JSON object per line")


def _json(text: str, name: str) -> Iterator[DataRow]:
    if not text.strip():
        raise NoRows(f"{name}: empty file; give a JSON array of objects")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # one object per line under the wrong ending
            yield from _json_lines(iter(text.split("\n")), name)
            return
        raise NoRows(f"{name}: not JSON ({error}); give a JSON array of objects") from None
    if isinstance(value, dict):
        lists = [value[key] for key in LISTS if isinstance(value.get(key), list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not value:
        raise NoRows(f"{name}: its JSON value is not a list of rows; give a JSON array of objects")
    for number, row in enumerate(value):
        yield DataRow(row, number, f"{name}: row {number}")


def _table(lines: Iterator[str], name: str, delimiter: str) -> Iterator[DataRow]:
    csv.field_size_limit(sys.maxsize)  # one document may be longer than the default of 128 kB
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True, restkey="")
    try:
        for number, row in enumerate(reader):
            where = f"{name}:{reader.line_num}"
            if "" in row and isinstance(row[""], list):
                raise DataError(f"{where}: more fields than the header has; quote fields with {delimiter!r}")
            yield DataRow(row, number, where)
        if reader.line_num < 2:
            raise NoRows(f"{name}: has no rows; give a line of column names and rows below it")
    except csv.Error as error:
        raise DataError(f"{name}: not CSV after line {reader.line_num} ({error}); check its quotes") from None


def _parquet(file: Path, name: str) -> Iterator[DataRow]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{name}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: not a Parquet file ({reason}); download it again") from None
    number = 0
    try:
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield DataRow(row, number, f"{name}: row {number}")
                number += 1
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: damaged after row {number} ({reason}); download it again") from None
    if number == 0:
        raise NoRows(f"{name}: has no rows")
