"""The score of a model, in the form that receipts, run folders and pages use."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from .bootstrap import Interval, wilson

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class Score:
    """A value with its unit and its 95 % interval over ``n`` items (None if it makes no sense).

    ``detail`` has breakdowns: ``by_lang``, ``by_form``, ``by_length`` ... map a key to ``{value, lo, hi,
    n}``, and ``grid`` lists ``{length, depth, value}``. Fractions have the unit "fraction".
    """

    name: str
    value: float
    unit: str
    lo: float | None = None
    hi: float | None = None
    n: int | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def record(self, model: str | None = None) -> dict[str, Any]:
        """Return the entry of a run's ``scores.json``."""
        return ({} if model is None else {"model": model}) | asdict(self)

    def __str__(self) -> str:
        number = (lambda x: f"{100 * x:.1f} %") if self.unit == "fraction" else (lambda x: f"{x:.4g}")
        unit = "" if self.unit == "fraction" else f" {self.unit}"
        interval = "" if self.lo is None or self.hi is None else f" [{number(self.lo)}, {number(self.hi)}]"
        n = "" if self.n is None else f", n={self.n}"
        return f"{self.name} {number(self.value)}{unit}{interval}{n}"


def from_interval(
    name: str, interval: Interval, unit: str, n: int, detail: dict[str, Any] | None = None
) -> Score:
    """Return the score for a value with its interval."""
    return Score(name, interval.value, unit, _known(interval.lo), _known(interval.hi), n, detail or {})


def share(name: str, hits: Sequence[bool], detail: dict[str, Any] | None = None) -> Score:
    """Return a fraction of items with Wilson's interval."""
    return from_interval(name, wilson(sum(map(bool, hits)), len(hits)), "fraction", len(hits), detail)


def shares_by(keys: Iterable[Hashable], hits: Iterable[bool]) -> dict[str, dict[str, Any]]:
    """Return the fraction in each group as ``{key: {value, lo, hi, n}}``, in order of first appearance."""
    groups = grouped(map(str, keys), map(bool, hits))
    return {key: part(wilson(sum(some), len(some)), len(some)) for key, some in groups.items()}


def grouped(keys: Iterable[K], values: Iterable[V]) -> dict[K, list[V]]:
    """Return the values of each key, in order of first appearance."""
    groups: dict[K, list[V]] = {}
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).append(value)
    return groups


def part(interval: Interval, n: int) -> dict[str, Any]:
    """Return an entry of a breakdown."""
    return {"value": interval.value, "lo": _known(interval.lo), "hi": _known(interval.hi), "n": n}


def _known(bound: float) -> float | None:
    return None if math.isnan(bound) else bound
