"""Store predictions with the measurements that followed, and learn correction factors from them.

Each event is one line of JSON in ``scores.jsonl`` of the cache folder: the predicted value (seconds or
bytes), the measured value, and the machine. Events are only appended. A line that a crash truncated is
skipped. `learned_factors` computes the median ratio of measured to predicted values by kind of work, from the
runs of this machine. Predictions use these factors only if the user asks for them (``herd plan --learned``).
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import PlanError
from ..machine import cache_folder
from ..report.receipt import utc_now

LEARN_FROM = 20
"""Number of latest events of a kind that a factor is learned from."""
MIN_EVENTS = 3
"""Fewest events for a factor, because two can agree by accident."""


@dataclass(frozen=True)
class ScoredPrediction:
    """One prediction and its measurement.

    ``kind`` is the kind of work or amount ("decode", "prefill", "stage", "peak memory"), ``what`` describes
    the work, ``unit`` is "s" or "bytes", and ``machine`` is the profile's key.
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
        """Error relative to the measurement: 0.1 means that the prediction is 10 % too high."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class ErrorSummary:
    """Errors of one kind: events, median and worst error, and median ratio of measured to predicted."""

    kind: str
    n: int
    median_error: float
    worst_error: float
    factor: float


def history_path() -> Path:
    return cache_folder() / "scores.jsonl"


def record_prediction(event: ScoredPrediction) -> None:
    """Append one event. Errors in writing are ignored, because they should not fail a run.

    Raises `PlanError` if a number is not positive.
    """
    if not (event.predicted > 0 and event.measured > 0 and math.isfinite(event.predicted + event.measured)):
        raise PlanError(f"{event.kind}: {event.predicted} and {event.measured} must be positive")
    line = json.dumps(asdict(event) | {"date": event.date or utc_now()}, ensure_ascii=False) + "\n"
    with suppress(OSError):
        history_path().parent.mkdir(parents=True, exist_ok=True)
        # without a buffer this is one write call, so that lines of several processes do not mix
        with history_path().open("ab", buffering=0) as file:
            file.write(line.encode())


def read_history() -> list[ScoredPrediction]:
    """Return all events, oldest first. Lines that are not events are skipped."""
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
    """Return the factors for predictions on a machine, by kind of work. Kinds with few events are absent.

    Predictions are recorded without the factor, so the same error is not learned twice.
    """
    kinds = _by_kind(event for event in read_history() if event.machine == machine)
    return {
        kind: _median_ratio(found[-LEARN_FROM:]) for kind, found in kinds.items() if len(found) >= MIN_EVENTS
    }


def _by_kind(events: Iterable[ScoredPrediction]) -> dict[str, list[ScoredPrediction]]:
    kinds: defaultdict[str, list[ScoredPrediction]] = defaultdict(list)
    for event in events:
        kinds[event.kind].append(event)
    return kinds


def _median_ratio(events: list[ScoredPrediction]) -> float:
    return statistics.median(event.measured / event.predicted for event in events)
