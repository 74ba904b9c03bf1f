"""Measure how often a 95 % interval contains the true value.

    python bench/interval_coverage.py

Pairs of models with a known difference are simulated: every item has a difficulty, both models answer it, and
`paired_difference` gives an interval for the difference of the population they come from. The cases differ in
the kind of score (right or wrong; a share; bits over bytes) and in the number of items. With 2,000 pairs per
case, an interval with a coverage of exactly 95 % shows 94 to 96 % in 96 of 100 runs. With 500 pairs, one of
the nine cases would leave 93 to 97 % by chance in every third run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common import bench_parser, save_receipt
from herd.evals.bootstrap import paired_difference
from herd.report.receipt import Value

PAIRS, SEED = 2000, 0
Draw = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Case:
    """A simulated case: ``draw(random, n)`` gives (first, second, weights or None) of n items."""

    what: str
    n: int
    truth: float
    draw: Callable[[np.random.Generator, int], Draw]


def right_or_wrong(gap: float) -> Callable[[np.random.Generator, int], Draw]:
    """Return a case with items from easy to hard, on each of which the first model is better by ``gap``."""

    def draw(random: np.random.Generator, n: int) -> Draw:
        chance = gap / 2 + (1 - gap) * random.beta(1.5, 1.0, n)
        first, second = random.random(n) < chance + gap / 2, random.random(n) < chance - gap / 2
        return first.astype(float), second.astype(float), None

    return draw


def shares(random: np.random.Generator, n: int) -> Draw:
    """How many of four things were found. The first model finds each with 10 points more."""
    chance = 0.1 + 0.8 * random.beta(2, 2, n)
    return random.binomial(4, chance + 0.05) / 4, random.binomial(4, chance - 0.05) / 4, None


def bits(random: np.random.Generator, n: int) -> Draw:
    """Documents of very different lengths. The second model needs 0.05 bits a byte more, give or take."""
    n_bytes = np.exp(random.normal(6, 0.8, n))
    each = random.normal(1.4, 0.3, n)
    return each * n_bytes, (each + 0.05 + random.normal(0, 0.1, n)) * n_bytes, n_bytes


CASES = (
    *(Case(f"right or wrong, {n} items", n, 0.08, right_or_wrong(0.08)) for n in (30, 100, 300, 1000)),
    *(Case(f"shares of four, {n} items", n, 0.10, shares) for n in (30, 100)),
    *(Case(f"bits per byte, {n} documents", n, -0.05, bits) for n in (30, 100, 300)),
)


def coverage(case: Case, seed: int) -> float:
    """Return the share of pairs whose interval contains the true value."""
    held = 0
    for pair in range(PAIRS):
        random = np.random.default_rng([seed, pair, case.n])
        first, second, weights = case.draw(random, case.n)
        interval = paired_difference(first, second, weights, seed=pair)
        held += interval.lo <= case.truth <= interval.hi
    return held / PAIRS


def main() -> None:
    """Measure every case, print, write the receipt."""
    bench_parser(__doc__).parse_args()
    values = {}
    for number, case in enumerate(CASES):
        found = coverage(case, SEED + number)
        values[case.what] = Value(100 * found, "%", bar="93 to 97", passed=0.93 <= found <= 0.97)
        print(f"{case.what}: {100 * found:.1f} %", flush=True)
    save_receipt(
        "interval-coverage",
        what=f"95 % intervals of paired differences: coverage of the true one, {PAIRS:,} pairs per case",
        values=values,
        seed=SEED,
    )


if __name__ == "__main__":
    main()
