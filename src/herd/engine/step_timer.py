"""Choose how many draft tokens to verify per step, from measured step times and the acceptance rate so far.

Verifying k draft tokens for each of B sequences is one forward over B (k + 1) tokens instead of B. While
reading the weights takes most of the time, that is nearly free, so a single user gains from many draft
tokens. With sixteen users the arithmetic takes most of the time, and a rejected token costs as much as an
accepted one saves. Where the change happens depends on machine, model, draft and text. So the engine measures
the seconds of a forward by its number of tokens, and the fraction of draft tokens accepted. It takes the k
with the most expected tokens per second. A number of tokens that has not been measured recently is assumed to
be fast, so that it is tried.

The choice does not change any distribution: every k is lossless (`speculate.py`). Requests with a seed are
left out, since their tokens must not depend on a clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

REMEMBERED = 500
"""Steps after which a measured time is forgotten, so that a number of tokens once slow is tried again."""
DRIFT = 1.05
"""Factor by which the fastest time grows with each measurement, so that recent ones count more. The fastest
counts because slower ones have causes outside the model."""


class StepTimer:
    """Seconds of a forward by its number of tokens, interpolated linearly."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._noted: dict[int, int] = {}  # number of the step that measured it last
        self._n_steps = 0

    def note(self, n_tokens: int, seconds: float) -> None:
        """Record that a forward over ``n_tokens`` took ``seconds``."""
        n, self._n_steps = _rounded(n_tokens), self._n_steps + 1
        self._seconds[n] = min(seconds, DRIFT * self._seconds.get(n, seconds))
        self._noted[n] = self._n_steps
        for old in [n for n, at in self._noted.items() if at < self._n_steps - REMEMBERED]:
            del self._noted[old], self._seconds[old]

    def seconds(self, n_tokens: int) -> float:
        """Return the seconds of a forward over ``n_tokens``.

        Outside the measured range the optimistic bound is returned: proportional to the tokens below it, and
        the time of the largest measured number above it.
        """
        known, n = sorted(self._seconds), _rounded(n_tokens)
        at = bisect_left(known, n)
        if not known:
            return 0.0
        if at == len(known):
            return self._seconds[known[-1]]
        if at == 0:
            return self._seconds[known[0]] * n / known[0]
        low, high = known[at - 1], known[at]
        fraction = (n - low) / (high - low)
        return (1 - fraction) * self._seconds[low] + fraction * self._seconds[high]


def tokens_per_round(acceptance_rate: float, k: int) -> float:
    """Return the expected tokens of a round with k draft tokens, (1 - a^(k+1)) / (1 - a).

    Source: Leviathan et al., arXiv 2211.17192, section 3.2.
    """
    a = acceptance_rate
    return k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)


def best_draft_length(
    most: int, acceptance_rates: Sequence[float], n_tokens: int, model: StepTimer, draft: StepTimer
) -> int:
    """Return the fastest number of draft tokens, up to ``most``, for sequences with these acceptance rates.

    ``n_tokens`` is the size of the forward without draft tokens. The draft runs k times for all sequences.
    """
    n_sequences = len(acceptance_rates)

    def tokens_per_second(k: int) -> float:
        seconds = model.seconds(n_tokens + k * n_sequences) + k * draft.seconds(n_sequences)
        return sum(tokens_per_round(a, k) for a in acceptance_rates) / seconds if seconds else float(k)

    return max(range(most + 1), key=tokens_per_second)


def _rounded(n: int) -> int:
    """Round down to four significant bits, so that there are few different numbers of tokens."""
    step = 1 << max(0, n.bit_length() - 4)
    return n - n % step
