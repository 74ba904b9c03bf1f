"""Confidence intervals of 95 %: by resampling items, or by Wilson's formula for fractions.

Resampling is with replacement, and seeded. Items (documents, dialogs) are resampled, not tokens, because the
tokens of a document are not independent. To compare two models, the *differences* on the same items are
resampled (`paired_difference`), so that the difficulty of the items cancels out. Source: Efron & Tibshirani,
"An Introduction to the Bootstrap" (1993), percentile intervals, the jackknife; Hesterberg, Am. Stat. 69
(2015), widening them for few items; Kish, "Survey Sampling" (1965), the effective number of unequal items;
Wilson, JASA 22 (1927). bench/interval_coverage.py measures how often the intervals contain the true value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError

DRAWS = 2000
_CHUNK = 1 << 21  # random indices in memory at a time


class Interval(NamedTuple):
    """A value and its interval. The bounds are NaN for a single item, which says nothing about the spread."""

    value: float
    lo: float
    hi: float


def mean_interval(values: ArrayLike, *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return the mean of one number per item, with its interval."""
    numbers = _numbers("values", values)
    return ratio_interval(numbers, np.ones_like(numbers), seed=seed, draws=draws)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> Interval:
    """Return the sum of numerators divided by the sum of denominators, e.g. bits and bytes of documents."""
    top, bottom = _numbers("numerators", numerators), _numbers("denominators", denominators)
    if len(top) != len(bottom):
        raise DataError(f"{len(top)} numerators for {len(bottom)} denominators: each item needs both")
    value = float(top.sum() / bottom.sum())
    if np.count_nonzero(bottom) < 2:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, _CHUNK // len(top))
    for start in range(0, draws, step):
        picked = rng.integers(0, len(top), (min(step, draws - start), len(top)))
        means[start : start + len(picked)] = top[picked].sum(1) / bottom[picked].sum(1)
    tail = _tail(top, bottom, level)
    lo, hi = np.quantile(means, [tail, 1 - tail])
    return Interval(value, float(lo), float(hi))


def paired_difference(
    a: ArrayLike, b: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0
) -> Interval:
    """Return the mean of ``a`` - ``b`` on the same items.

    With ``weights`` (bytes, tokens), return the difference of the two ratios.

    An interval without 0 means that one model is better on items like these.
    """
    first, second = _numbers("a", a), _numbers("b", b)
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} values: a paired difference needs the same items")
    weights = np.ones_like(first) if weights is None else weights
    return ratio_interval(first - second, weights, seed=seed)


def wilson(successes: int, n: int, z: float = 1.959964) -> Interval:
    """Return a fraction with Wilson's interval. It is valid near 0 and 1 too, unlike the bootstrap."""
    if not 0 <= successes <= n or n < 1:
        raise DataError(f"{successes} successes of {n}: a share needs at least one item")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def _tail(top: NDArray[np.float64], bottom: NDArray[np.float64], level: float) -> float:
    """Return the fraction of draws to exclude at either end of the interval.

    It is less than half of 1 - ``level``, for two reasons. First, resampled ratios spread too little, because
    a long document pulls the ratio towards itself. Leaving out each item in turn (the jackknife) measures by
    how much. Second, with few items the tails of Student's distribution are wider than the normal ones.
    Documents of unequal length count as (sum of lengths)^2 / (sum of squares) items. Together this widens the
    interval by a quarter for 20 equal items and very little for 1,000. Student's quantile comes from the
    first terms of Cornish and Fisher's expansion.
    """
    n, total, whole = len(top), top.sum(), bottom.sum()
    without = (total - top) / (whole - bottom)
    jackknife = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    resampled = math.sqrt(((top - total / whole * bottom) ** 2).sum()) / whole
    z, free = NormalDist().inv_cdf((1 + level) / 2), whole**2 / (bottom**2).sum() - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return NormalDist().cdf(-t * (jackknife / resampled if resampled else 1.0))


def _numbers(name: str, values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise DataError(f"{name} has shape {numbers.shape}: give one number per item, and at least one item")
    if not np.isfinite(numbers).all():
        raise DataError(f"{name} has {int((~np.isfinite(numbers)).sum())} numbers that are not finite")
    return numbers
