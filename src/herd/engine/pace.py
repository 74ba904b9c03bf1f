"""How many guesses pay: from the engine's own clock, and from how the last guesses fared.

Checking k guesses for each of B rows is one forward over B (k + 1) tokens instead of B. While reading the weights is
what takes the time that is nearly free, so one user alone wants many guesses; sixteen at once keep the arithmetic busy,
and there a wrong guess costs what a right one saves. Where the one becomes the other depends on machine, model, draft
and text, so it is measured on the way: seconds by number of tokens, and the share of guesses that stayed. The k is
taken that gives most tokens a second. What has not been tried yet, or not for long, is thought well of, so it is tried.

The choice changes which guesses are made, not what they are worth: every k is lossless (`speculate.py`). A request
with a seed is left out of it, since its tokens must not depend on a clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from .speculate import tokens_a_round

REMEMBERED = 500
"""Steps after which a measured time is forgotten, so that what once was slow is tried again."""
DRIFT = 1.05
"""The fastest of the last times counts, since slower ones had other reasons; each new one lets it grow by so much."""


class Pace:
    """Seconds of a forward by its number of tokens; between two known numbers as if on a line."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._noted: dict[int, int] = {}  # when, in steps
        self._n_steps = 0

    def note(self, n_tokens: int, seconds: float) -> None:
        """A forward over so many tokens took so long."""
        n, self._n_steps = _rounded(n_tokens), self._n_steps + 1
        self._seconds[n] = min(seconds, DRIFT * self._seconds.get(n, seconds))
        self._noted[n] = self._n_steps
        for old in [n for n, at in self._noted.items() if at < self._n_steps - REMEMBERED]:
            del self._noted[old], self._seconds[old]

    def seconds(self, n_tokens: int) -> float:
        """The time of so many; beyond what is known the best that could be: no more, or in proportion less."""
        known, n = sorted(self._seconds), _rounded(n_tokens)
        at = bisect_left(known, n)
        if not known:
            return 0.0
        if at == len(known):
            return self._seconds[known[-1]]
        if at == 0:
            return self._seconds[known[0]] * n / known[0]
        low, high = known[at - 1], known[at]
        share = (n - low) / (high - low)
        return (1 - share) * self._seconds[low] + share * self._seconds[high]


def best_guesses(most: int, acceptances: Sequence[float], n_tokens: int, model: Pace, draft: Pace) -> int:
    """How many guesses, up to ``most``, for each of the rows whose guesses stay with these probabilities.

    ``n_tokens`` are those of the forward without any guess. The draft is asked k times for all rows.
    """
    rows = len(acceptances)

    def rate(k: int) -> float:
        seconds = model.seconds(n_tokens + k * rows) + k * draft.seconds(rows)
        return sum(tokens_a_round(a, k) for a in acceptances) / seconds if seconds else float(k)

    return max(range(most + 1), key=rate)


def _rounded(n: int) -> int:
    """To three significant bits behind the first, so that there are few numbers to know."""
    step = 1 << max(0, n.bit_length() - 4)
    return n - n % step
