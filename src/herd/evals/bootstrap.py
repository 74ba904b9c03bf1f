"""Give numbers 95 % intervals: by resampling items, or by Wilson's formula for plain shares.

Resampling is with replacement, and seeded. Items (documents, dialogs) are resampled, not tokens, because the
tokens of a document are not independent. To compare two models, the *differences* on the same items are
resampled (`paired_difference`), so that what both find hard cancels out. Source: Efron & Tibshirani, "An
Introduction to the Bootstrap" (1993), percentile intervals, the jackknife; Hesterberg, Am. Stat. 69 (2015),
widening them for few items; Kish, "Survey Sampling" (1965), the effective number of unequal items; Wilson,
JASA 22 (1927). bench/interval_coverage.py measures how often they hold the true value.
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
_CHUNK = 1 << 21  # random indices alive at a time


class Interval(NamedTuple):
    """A value and its interval; the bounds are NaN where a single item says nothing about the spread."""

    value: float
    lo: float
    hi: float


def mean_interval(values: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Return the mean of a number per item."""
    numbers = _numbers("values", values)
    return ratio_interval(numbers, np.ones_like(numbers), seed=seed, draws=draws, level=level)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> Interval:
    """Return the sum of numerators over the sum of denominators, e.g. bits and bytes of documents."""
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
    a: ArrayLike, b: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Return ``a`` - ``b`` on the same items.

    With ``weights`` (bytes, tokens), the difference of the two ratios.

    An interval without 0 means that one model is better on items like these.
    """
    first, second = _numbers("a", a), _numbers("b", b)
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} values: a paired difference needs the same items")
    weights = np.ones_like(first) if weights is None else weights
    return ratio_interval(first - second, weights, seed=seed, draws=draws)


def wilson(successes: int, n: int, z: float = 1.959964) -> Interval:
    """Return a share with Wilson's interval, which also holds near 0 and 1, where the bootstrap fails."""
    if not 0 <= successes <= n or n < 1:
        raise DataError(f"{successes} successes of {n}: a share needs at least one item")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def _tail(top: NDArray[np.float64], bottom: NDArray[np.float64], level: float) -> float:
    """Return the share of the draws beyond either end of the interval.

    It is less than half of 1 - ``level``, for two reasons. Resampled ratios spread too little, because a long
    document pulls the ratio towards itself; leaving out each item in turn (the jackknife) says by how much.
    And with few items Student's tails are wider than the normal ones; documents of unequal length count as
    (sum of lengths)^2 / (sum of squares). Together this widens the interval by a quarter for 20 equal items
    and hardly at all for 1,000. Student's quantile comes from the first terms of Cornish and Fisher's
    expansion.
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
        raise DataError(f"{name} has shape {numbers.shape}: one number an item, at least one item")
    if not np.isfinite(numbers).all():
        raise DataError(f"{name} holds {int((~np.isfinite(numbers)).sum())} numbers that are not finite")
    return numbers
