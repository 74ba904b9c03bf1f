"""Fit a few factors to measured rows, and judge them on rows that were not used for the fit.

The error of a row is ``log(predicted / measured)``, so twice as fast and half as fast count the same. The fit
minimizes the mean of the absolute errors, which a single odd row cannot dominate, by changing one factor at a
time in ever smaller steps. A weak pull towards the start keeps factors that the rows do not determine at
their hardware values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Row = TypeVar("Row")
Predict = Callable[[Row, Mapping[str, float]], float]

PULL = 0.01  # added to the loss for each factor of e between a parameter and its start


def log_errors(
    rows: Sequence[Row], measured: Callable[[Row], float], predict: Predict[Row], values: Mapping[str, float]
) -> list[float]:
    """Return ``log(predicted / measured)`` of every row."""
    return [math.log(predict(row, values) / measured(row)) for row in rows]


def fit_factors(
    rows: Sequence[Row],
    measured: Callable[[Row], float],
    predict: Predict[Row],
    start: Mapping[str, float],
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, float]:
    """Return the factors with the least mean absolute log error on ``rows``, each within its limits."""
    limits = limits or {}

    def loss(values: Mapping[str, float]) -> float:
        errors = log_errors(rows, measured, predict, values)
        return statistics.fmean(map(abs, errors)) + PULL * sum(
            abs(math.log(values[k] / start[k])) for k in start
        )

    best = dict(start)
    least = loss(best)
    step = 0.5
    while step > 0.005:
        moved = False
        for name in start:
            for factor in (1 + step, 1 / (1 + step)):
                low, high = limits.get(name, (0.0, math.inf))
                trial = best | {name: min(max(best[name] * factor, low), high)}
                found = loss(trial)
                if found < least - 1e-9:
                    best, least, moved = trial, found, True
        if not moved:
            step /= 2
    return best


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the even and the odd rows. Neighbours are alike, so each half has rows of every kind."""
    return list(rows[::2]), list(rows[1::2])


def cross_fit(
    rows: Sequence[Row],
    measured: Callable[[Row], float],
    predict: Predict[Row],
    start: Mapping[str, float],
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[list[float], tuple[dict[str, float], dict[str, float]]]:
    """Return the relative errors of all rows, each predicted from the other half's fit, and both fits."""
    even, odd = halves(rows)
    for_odd, for_even = (
        fit_factors(even, measured, predict, start, limits),
        fit_factors(odd, measured, predict, start, limits),
    )
    errors = [
        predict(row, for_even if index % 2 == 0 else for_odd) / measured(row) - 1
        for index, row in enumerate(rows)
    ]
    return errors, (for_odd, for_even)
