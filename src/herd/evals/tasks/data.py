"""The data of benchmarks: a folder with one subfolder per benchmark, in the data sets' own formats.

``--data DIR`` names such a folder, with files such as ``DIR/boolq/validation.jsonl``, which may be compressed
(``.gz``, ``.zst``, …): docs/how-to/benchmarks.md lists them. ``--data hf`` is in `hub_data.py`. Without this
option, the project's own ten items of every format are used (`builtin`). These are enough to check that
everything works, but too few for a meaningful score.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...data.text_files import COMPRESSED, decode_blocks, open_bytes
from ...errors import DataError

BUILTIN = Path(__file__).parents[1] / "builtin"

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """A folder of benchmarks, by default the project's own ten items of each (`builtin`)."""

    folder: Path = BUILTIN

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"--data {self.folder}: no such folder; leave --data out for the built-in items")

    @property
    def builtin(self) -> bool:
        return self.folder == BUILTIN

    @property
    def label(self) -> str:
        """Name of the data in tables and receipts."""
        return "builtin" if self.builtin else str(self.folder)

    def find(self, *names: str) -> Path | None:
        """Return the first of ``names`` (``benchmark/file``) that exists, plain or compressed."""
        for name in names:
            for ending in ("", *COMPRESSED):
                path = self.folder / f"{name}{ending}"
                if path.is_file():
                    return path
        return None

    def text(self, *names: str) -> str:
        """Return the text of the first file that exists.

        Raises `DataError` that names all of them if none does.
        """
        path = self.find(*names)
        if path is None:
            wanted = " or ".join(names)
            raise DataError(
                f"no {wanted} in {self.folder}: put it there, or leave out --data (built-in items)"
            )
        return _load(path, path.stat().st_mtime_ns)

    def rows(self, *names: str, needs: Sequence[str] = ()) -> list[Row]:
        """Read JSON lines, each an object with the fields ``needs``."""
        text = self.text(*names)
        path = self.find(*names)
        out: list[Row] = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                missing = [name for name in needs if name not in row]
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: not a JSON object ({error}); fetch it again"
                ) from None
            if missing:
                raise DataError(
                    f"{path}, line {number}: no field {missing[0]!r}; it needs {', '.join(needs)}"
                )
            out.append(row)
        if not out:
            raise DataError(f"{path}: it has no items; fetch it again")
        return out

    def table(self, *names: str) -> list[Row]:
        """Read a CSV file with a header."""
        return list(csv.DictReader(io.StringIO(self.text(*names))))


@lru_cache(maxsize=4)
def _load(path: Path, changed: int) -> str:
    """Return a file's text. Cached, because shots and questions often come from the same file."""
    with open_bytes(path) as stream:
        return "".join(decode_blocks(stream, str(path)))
