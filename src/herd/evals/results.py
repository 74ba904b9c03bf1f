"""What an evaluation leaves on disk, and how it is read back. Everything is plain JSON.

::

    runs/evals/student-1a2b3c4d/            one folder a model: its name and the first digits of its weights' hash
        summary.json                        one `TaskResult` a task, as of the last run
        boolq-5shot-base-9f8e7d6c.jsonl      one task with one set of settings: a head line, then an item a line

A task's file is the cache and the state to resume from. Its name ends in a hash of its head: model hash, task, version
and settings, so another setting is another file. A line is written in one piece and only then counts; half a line at
the end (the machine died while writing) is dropped. Each line has ``digest``, a hash of the very request: if the data
changed, the item is asked again.
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
from typing import Any

from ..errors import DataError
from ..files import write_atomically
from .score import Score

SCHEMA = 1


@dataclass(frozen=True)
class ItemResult:
    """One item's line. ``output``: the text written, or [nats, greedy, n_tokens] of every continuation."""

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
    """One row of the table. ``status``: "done", or "failed" with ``reason`` (one line naming the cure) and no scores.

    ``scores`` are `Score` records, the headline first; ``ids`` are the items they are of, which ``file`` holds (with
    more, if an earlier run asked more); ``n_items`` of ``n_total`` were asked (fewer by --limit); ``note`` is what a
    reader must know besides, e.g. that the data has fewer examples than shots.
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
        """The headline."""
        return Score(**self.scores[0]) if self.scores else None


@dataclass(frozen=True)
class Evaluation:
    """A model's folder as read back: ``summary`` is all of summary.json, ``tasks`` its rows."""

    folder: Path
    model: str
    model_hash: str
    tasks: Sequence[TaskResult]
    summary: Mapping[str, Any]

    def items(self, task: TaskResult) -> list[ItemResult]:
        """The items behind a row, in its order; none of those that only an earlier, longer run asked."""
        path = self.folder / task.file
        found = {item.id: item for item in read_items(path)}
        try:
            return [found[i] for i in task.ids or found]  # rows of before had no ids: all there is
        except KeyError as missing:
            raise DataError(f"{path}: item {missing} is not there; herd eval MODEL asks it again") from None


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON-ready value or dataclass."""
    plain = (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
    )
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


class TaskFile:
    """The open file of one task: what it holds already (`done`, by item id), and `add` for more.

    A file that belongs to another model, version or setting cannot be met here, as its name differs; one that is no
    task file at all is refused.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, ItemResult] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._recover(head)
        except BaseException:
            self.close()
            raise

    def add(self, results: Sequence[ItemResult]) -> None:
        """Append results; each is on disk as a whole or not at all."""
        for result in results:
            self._write(dataclasses.asdict(result))
            self.done[result.id] = result

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> TaskFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        """One writer at a time, so that no item is asked twice; the system lets go when the process ends, however."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"{self.path}: another herd eval is writing it; wait or give another --out"
            ) from None

    def _recover(self, head: Mapping[str, Any]) -> None:
        """Read what is whole, cut off what is not, and leave the write position at the end."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        os.lseek(self._file, whole, os.SEEK_SET)
        if not whole:
            return self._write(dict(head))
        self.done = {result.id: result for result in _parse(self.path, data[:whole])}
        return None

    def _write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        while line:
            line = line[os.write(self._file, line) :]


def read_items(path: Path) -> Iterator[ItemResult]:
    """The items of a task's file; an item asked again (its data had changed) counts once, as it was last."""
    latest = {result.id: result for result in _parse(path, path.read_bytes())}
    yield from latest.values()


def _parse(path: Path, data: bytes) -> Iterator[ItemResult]:
    lines = data.split(b"\n")
    try:
        if json.loads(lines[0])["schema"] != SCHEMA:
            raise ValueError("another schema")
        for line in lines[1:]:
            if line:
                yield ItemResult(**json.loads(line))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not a results file ({error}); delete it, and its items are asked again"
        ) from None


def write_summary(
    folder: Path, model: str, model_hash: str, tasks: Sequence[TaskResult], **more: Any
) -> Path:
    """summary.json of a folder, in one piece."""
    rows = [dataclasses.asdict(task) for task in tasks]
    record = {"schema": SCHEMA, "model": model, "model_hash": model_hash, **more, "tasks": rows}
    path = folder / "summary.json"
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_evaluation(folder: Path | str) -> Evaluation:
    """A folder written by `herd eval`. Raises DataError if it is none."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows = [TaskResult(**row) for row in summary["tasks"]]
        return Evaluation(folder, summary["model"], summary["model_hash"], rows, summary)
    except OSError:
        raise DataError(
            f"{folder}: no evaluation here (no summary.json); make one with: herd eval MODEL"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'summary.json'}: unreadable ({error}); herd eval MODEL makes it anew"
        ) from None
