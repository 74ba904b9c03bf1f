"""Keep predictions with the measurements that followed, and learn factors from them.

Each event is one line of JSON in ``scores.jsonl`` of the cache folder: what was predicted (seconds, bytes),
what was measured, and on which machine. The file is only appended to; a line cut short by a crash is skipped.
`learned_factors` is what this machine's own runs say about the planner: the median of measured over predicted
by kind of work. Predictions use it only where the user asks for it (``herd plan --learned``).
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import PlanError
from ..machine import cache_folder
from .profile import utc_now

LEARN_FROM = 20
"""Latest events of a kind from which a factor is learned."""
LEAST = 3
"""Fewest events for a factor: two points can agree by accident."""


@dataclass(frozen=True)
class ScoredPrediction:
    """One prediction and its measurement.

    ``kind`` is what was predicted ("decode", "prefill", "stage", "peak memory"), ``what`` describes the work,
    ``unit`` is "s" or "bytes", ``machine`` is the profile's key.
    """

    kind: str
    what: str
    unit: str
    predicted: float
    measured: float
    machine: str
    date: str = ""

    @property
    def error(self) -> float:
        """Error relative to the measurement: 0.1 is ten percent too much."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class ErrorSummary:
    """Errors of one kind: number, median and worst error, and the median of measured over predicted."""

    kind: str
    n: int
    median_error: float
    worst_error: float
    factor: float


def history_path() -> Path:
    return cache_folder() / "scores.jsonl"


def record_prediction(event: ScoredPrediction) -> None:
    """Append one event; a cache folder that cannot be written is no reason to fail a run.

    Raises PlanError for numbers that are not positive.
    """
    if not (event.predicted > 0 and event.measured > 0 and math.isfinite(event.predicted + event.measured)):
        raise PlanError(
            f"{event.kind}: predicted {event.predicted} and measured {event.measured} must be positive"
        )
    line = json.dumps(asdict(event) | {"date": event.date or utc_now()}, ensure_ascii=False) + "\n"
    with suppress(OSError):
        history_path().parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(history_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())  # a single write, so that lines of several processes do not mix
        finally:
            os.close(handle)


def read_history() -> list[ScoredPrediction]:
    """Return all events, oldest first; lines that are not events are skipped."""
    events = []
    with suppress(OSError):
        for line in history_path().read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError):
                event = ScoredPrediction(**json.loads(line))
                if event.predicted > 0 and event.measured > 0:
                    events.append(event)
    return events


def summarize_errors(events: Iterable[ScoredPrediction]) -> list[ErrorSummary]:
    """Return a summary of each kind, in order of first appearance."""
    summaries = []
    for kind, found in _by_kind(events).items():
        errors = [abs(event.error) for event in found]
        median, worst = statistics.median(errors), max(errors)
        summaries.append(ErrorSummary(kind, len(found), median, worst, _median_ratio(found)))
    return summaries


def learned_factors(machine: str) -> dict[str, float]:
    """Return what to multiply predictions by, by kind of work; kinds with few events are absent.

    Predictions are recorded without the factor, so the same error is never learned twice.
    """
    kinds = _by_kind(event for event in read_history() if event.machine == machine)
    return {kind: _median_ratio(found[-LEARN_FROM:]) for kind, found in kinds.items() if len(found) >= LEAST}


def _by_kind(events: Iterable[ScoredPrediction]) -> dict[str, list[ScoredPrediction]]:
    kinds: defaultdict[str, list[ScoredPrediction]] = defaultdict(list)
    for event in events:
        kinds[event.kind].append(event)
    return kinds


def _median_ratio(events: list[ScoredPrediction]) -> float:
    return statistics.median(event.measured / event.predicted for event in events)
