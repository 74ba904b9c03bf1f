"""The log of a run: a JSON line per logged step in ``metrics.jsonl``, and TensorBoard if asked for.

A resumed run repeats steps that the killed one had already logged. Lines beyond the resumed step, and an
incomplete last line, are dropped first. So the file of a run that was killed ten times differs from the file
of an uninterrupted run only in seconds and speeds.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files import write_atomically

FILE = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all complete records of a run's folder in order, or [] if there is no file yet.

    Raises `TrainingError` for a broken line that is not the last.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # the rest was never finished
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(
                f"{path}:{number} is not a metrics record: remove this line or the file"
            ) from error
        records.append(record)
    return records


class MetricsLog:
    """The log of a run, opened at the step from which the run continues."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        path = Path(folder) / FILE
        kept = [record for record in read(folder) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(Path(folder) / "tensorboard", step) if tensorboard else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record with a ``step``. Its numbers also go to TensorBoard."""
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def sync(self) -> None:
        """Bring all lines to the disk: a state must not reach the disk before its log does."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboard is not installed, metrics go to metrics.jsonl only: pip install tensorboard",
            stacklevel=4,
        )
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
