"""Data sets of benchmarks from the Hugging Face hub (``--data hf``), downloaded when a task asks for a file.

The hub keeps every data set as Parquet, too, in a branch of its own with one folder per configuration and
split. The rows are written to Herd's cache in the formats that the tasks read.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ...data.hub import unreachable
from ...data.rows import read_rows
from ...errors import DataError
from ...files import write_atomically
from ...machine import cache_folder
from ...package_yaml import package_yaml
from .data import Data

BRANCH = "refs/convert/parquet"
FILES: dict[str, str] = package_yaml(__package__, "hub.yaml")
"""Data set, configuration and splits by the name of the file."""


def _folder() -> Path:
    folder = cache_folder() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class HubData(Data):
    """The folder of the files that were downloaded. Those that are missing are downloaded."""

    folder: Path = field(default_factory=_folder)

    def find(self, *names: str) -> Path | None:
        """Return the first of ``names`` that exists, or download the first one that is on the hub.

        Raises `DataError` if the hub cannot be reached.
        """
        found = super().find(*names)
        known = next((name for name in names if name in FILES), None)
        return self._download(known) if found is None and known else found

    def _download(self, name: str) -> Path:
        repository, config, *splits = FILES[name].split()
        print(f"downloading {name} from hf:{repository}", file=sys.stderr)
        hub = importlib.import_module("huggingface_hub")
        where = {"repo_type": "dataset", "revision": BRANCH}
        try:
            found = [part.split("/") for part in sorted(hub.HfApi().list_repo_files(repository, **where))]
            chosen = [
                "/".join(part) for split in splits for part in found
                if part[1:2] == [split] and config in ("*", part[0])
            ]  # fmt: skip
            files = [Path(hub.hf_hub_download(repository, part, **where)) for part in chosen]
        except Exception as error:
            raise unreachable(repository, error) from error
        if not files:
            raise DataError(
                f"hf:{repository}: has no {config}/{splits[0]}; give your own copy with --data DIR"
            )
        rows = [row.value for file in files for row in read_rows(file, f"hf:{repository}")]
        if name.endswith(".tsv"):
            lines = [f"{' '.join(row['question'].split())}\t{row['answer_number']}" for row in rows]
        else:
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_atomically(self.folder / name, "".join(f"{line}\n" for line in lines))
        return self.folder / name
