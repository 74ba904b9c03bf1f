"""Storage of an evaluation's results as plain JSON.

::

    runs/evals/student-1a2b3c4d/            a folder per model: its name and the start of its weights' hash
        summary.json                        a `TaskResult` per task, from the last run
        boolq-5shot-base-9f8e7d6c.jsonl      a task with its settings: a head line, then a line per item

A task's file is both a cache and the state to resume from. Its name ends in a hash of its head (model hash,
task, version, settings), so other settings go to another file. Each line is written with one call. An
incomplete line at the end (the machine stopped while writing) is dropped. Each line has ``digest``, a hash of
the request. If the data changes, the item is asked again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..dtypes import DTYPES
from ..errors import DataError
from ..files import write_json
from .score import Score

SCHEMA = 1


@dataclass(frozen=True)
class ItemResult:
    """The result of an item. ``output`` is the text, or [nats, greedy, n_tokens] of every continuation."""

    id: str
    value: float
    gold: Any
    extracted: Any
    output: Any
    group: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    finish_reason: str = ""
    digest: str = ""


@dataclass(frozen=True)
class TaskResult:
    """The result of a task. ``status`` is "done", or "failed" with a ``reason`` of one line and no scores.

    ``scores`` are `Score` records, the main one first. ``ids`` are the items that they count. ``file``
    contains these items, and possibly more from an earlier run. ``n_items`` of ``n_total`` were asked.
    ``note`` has remarks for readers, e.g. that the data has fewer examples than shots.
    """

    task: str
    status: str
    version: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()
    reason: str = ""
    note: str = ""
    n_items: int = 0
    n_total: int = 0
    seconds: float = 0.0
    file: str = ""
    ids: Sequence[str] = ()
    source: str = ""
    licence: str = ""
    shots_from: str = ""
    data: str = ""

    @property
    def score(self) -> Score | None:
        """The main score."""
        return Score(**self.scores[0]) if self.scores else None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation in a model's folder. ``summary`` is the contents of summary.json, ``tasks`` its rows."""

    folder: Path
    model: str
    model_hash: str
    tasks: Sequence[TaskResult]
    summary: Mapping[str, Any]

    def items(self, task: TaskResult) -> list[ItemResult]:
        """Return the items that a row counts, in its order. Further items of earlier runs are left out."""
        path = self.folder / task.file
        found = {item.id: item for item in read_items(path)}
        try:
            return [found[i] for i in task.ids or found]  # rows of older versions have no ids
        except KeyError as missing:
            raise DataError(f"{path}: item {missing} is missing; herd eval MODEL asks it again") from None


def digest(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of a dataclass or of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def results_file(out: Path, prefix: str, head: Mapping[str, Any]) -> Path:
    """Return the path of a task's file.

    Its name ends in a hash of ``head``, everything that results depend on.

    Earlier versions recorded dtypes by their long names (float32). An existing file of theirs is used.
    """
    path, older = (
        out / f"{prefix}-{digest(_with_dtypes(head, name))[:8]}.jsonl" for name in ("name", "torch_name")
    )
    return older if older.is_file() and not path.is_file() else path


def _with_dtypes(record: Mapping[str, Any], spelling: Literal["name", "torch_name"]) -> dict[str, Any]:
    """Return a record with its dtypes written by their short or by their long names."""
    out = dict(record)
    for key, value in record.items():
        if isinstance(value, Mapping):
            out[key] = _with_dtypes(value, spelling)
        elif key.endswith("precision"):
            found = next(
                (dtype for dtype in DTYPES.values() if value in (dtype.name, dtype.torch_name)), None
            )
            out[key] = getattr(found, spelling) if found else value
    return out


class TaskFile:
    """The open file of a task. `done` has the results so far by item id, `add` appends more.

    The file is locked for one process, and the system releases the lock when the process ends. Raises
    `DataError` if another process has locked the file or if it is not a results file.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, ItemResult] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover(head)
        except BlockingIOError:
            self.close()
            raise DataError(f"{path}: another herd eval is writing it; wait or give another --out") from None
        except BaseException:
            self.close()
            raise

    def add(self, results: Sequence[ItemResult]) -> None:
        """Append results, each as one line."""
        for result in results:
            self._write(dataclasses.asdict(result))
            self.done[result.id] = result

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> TaskFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recover(self, head: Mapping[str, Any]) -> None:
        """Read the complete lines, remove an incomplete one, and leave the write position at the end."""
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        os.ftruncate(self._file, complete)
        os.lseek(self._file, complete, os.SEEK_SET)
        if complete:
            self.done = {result.id: result for result in _parse(self.path, data[:complete])}
        else:
            self._write(dict(head))

    def _write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        while line:
            line = line[os.write(self._file, line) :]


def read_items(path: Path) -> Iterator[ItemResult]:
    """Yield the items of a task's file. Of an item that was asked again, only the latest result counts."""
    yield from {result.id: result for result in _parse(path, path.read_bytes())}.values()


def _parse(path: Path, data: bytes) -> Iterator[ItemResult]:
    head, *lines = data.split(b"\n")
    try:
        if json.loads(head)["schema"] != SCHEMA:
            raise ValueError("another schema")
        for line in filter(None, lines):
            yield ItemResult(**json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a results file ({error}); delete it to ask its items again") from None


def write_summary(
    folder: Path, model: str, model_hash: str, tasks: Sequence[TaskResult], **more: Any
) -> None:
    """Write the summary.json of a folder."""
    rows = [dataclasses.asdict(task) for task in tasks]
    record = {"schema": SCHEMA, "model": model, "model_hash": model_hash, **more, "tasks": rows}
    write_json(folder / "summary.json", record)


def read_evaluation(folder: Path | str) -> Evaluation:
    """Read a folder that `herd eval` wrote. Raises DataError if it is not one."""
    path = Path(folder) / "summary.json"
    try:
        summary = _with_dtypes(json.loads(path.read_text(encoding="utf-8")), "name")
        rows = [TaskResult(**_with_dtypes(row, "name")) for row in summary["tasks"]]
        return Evaluation(path.parent, summary["model"], summary["model_hash"], rows, summary)
    except OSError:
        raise DataError(
            f"{folder}: no evaluation here (no summary.json); make one with: herd eval MODEL"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: unreadable ({error}); herd eval MODEL writes it again") from None
