"""Was the plan right? Every prediction beside what was measured, kept, and learned from.

One line of JSON an event, appended to ``scores.jsonl`` in the cache folder: what was predicted (seconds,
bytes), what was measured, on which machine. `factors` are what this machine's own runs say of the planner:
the median of measured over predicted, by kind of work, over the last events. The history is never rewritten;
a line cut short by a crash is skipped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import PlanError
from .profile import cache_folder, now

LEARN_FROM = 20
"""Latest events of a kind that a factor is made of."""
LEAST = 3
"""Events below which a factor stays 1: two points are an accident."""


@dataclass(frozen=True)
class Event:
    """One prediction come true, or not. ``kind``: what was predicted ("decode", "prefill", "stage", "peak
    memory"); ``what``: of what, in words; ``unit`` "s" or "bytes"."""

    kind: str
    what: str
    unit: str
    predicted: float
    measured: float
    machine: str  # the profile's key
    date: str = ""

    @property
    def error(self) -> float:
        """Relative to what was measured: 0.1 is ten percent too much."""
        return self.predicted / self.measured - 1


def history_path() -> Path:
    return cache_folder() / "scores.jsonl"


def record(event: Event) -> None:
    """Append one event. A cache folder that cannot be written is no reason to fail a run: the event is then
    lost. `PlanError` for numbers that are not positive."""
    if not (event.predicted > 0 and event.measured > 0 and math.isfinite(event.predicted + event.measured)):
        raise PlanError(
            f"{event.kind}: predicted {event.predicted} and measured {event.measured} must be positive"
        )
    line = json.dumps(asdict(event) | {"date": event.date or now()}, ensure_ascii=False) + "\n"
    try:
        history_path().parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(history_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())  # one write: lines of several processes do not mix
        finally:
            os.close(handle)
    except OSError:
        return


def history(path: Path | None = None) -> list[Event]:
    """All events, oldest first; lines that are not events are skipped."""
    try:
        lines = (path or history_path()).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = Event(**json.loads(line))
            if event.predicted > 0 and event.measured > 0:
                events.append(event)
        except (ValueError, TypeError):
            continue
    return events


@dataclass(frozen=True)
class Summary:
    """Errors of one kind: how many events, median and worst absolute error, median ratio of measured to
    predicted."""

    kind: str
    n: int
    median_error: float
    worst_error: float
    factor: float


def summaries(events: Iterable[Event]) -> list[Summary]:
    """By kind, in order of first appearance."""
    kinds: dict[str, list[Event]] = {}
    for event in events:
        kinds.setdefault(event.kind, []).append(event)
    return [
        Summary(
            kind,
            len(found),
            statistics.median(abs(event.error) for event in found),
            max(abs(event.error) for event in found),
            statistics.median(event.measured / event.predicted for event in found),
        )
        for kind, found in kinds.items()
    ]


def factors(machine: str, events: Iterable[Event] | None = None) -> dict[str, float]:
    """What to multiply predictions by on this machine, by kind: learned from its last runs, absent below
    `LEAST`.

    Predictions are recorded before the factor is applied, so learning twice from the same error cannot
    happen.
    """
    events = history() if events is None else events
    kinds: dict[str, list[float]] = {}
    for event in events:
        if event.machine == machine:
            kinds.setdefault(event.kind, []).append(event.measured / event.predicted)
    return {
        kind: statistics.median(ratios[-LEARN_FROM:])
        for kind, ratios in kinds.items()
        if len(ratios) >= LEAST
    }
