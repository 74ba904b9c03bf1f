"""Make rows that repeat one random passage. They quickly teach a model to look back and copy.

Using a tool is mostly copying: numbers from a question into a call, a result into an answer. Induction heads
do this ("B followed A before, so B follows A now"). Running text forms them only after about
10^5.7 · sqrt(tokens per step) tokens (Aoyama et al., arXiv 2511.16893), which is more than a small run has.

A row is one passage of *different* tokens, repeated to the end of the row. The first pass is not trained,
because nothing predicts it. Since no token occurs twice in a passage, the token before always decides the
next one, and a model of a million parameters learns to copy within about a million tokens. The number of
different tokens matters as much: a row draws from the lowest n ids, where n is log-uniform between
`FEW_IDS` and the whole vocabulary. Copying comes first where there are few, and then spreads to rare tokens.

Numbers repeat their digits, so copying them takes more than the token before. A model that can copy learns
this from passages of few tokens in random order, which recur (``recurring``). They do not teach copying
itself.

Shapes: B rows, T = context, S = T + 1, L tokens of a passage.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import DataError
from .batch import IGNORE
from .shuffle import generator, mixed_key
from .stream import EndlessRows

SHORTEST = 16
"""Fewest tokens of a passage, if the row has room to repeat it three times."""
FEW_IDS = 64
"""Size of the smallest alphabet. The lowest ids are single bytes, then frequent merges."""

MIN_RECURRING = 4
"""Fewest different tokens of a passage with recurring tokens."""


class CopyStream(EndlessRows):
    """Endless rows of ids below ``n_ids``, each with one passage repeated to its end.

    ``recurring`` is the fraction of rows whose passage has recurring tokens. Row p depends only on (seed, p).
    """

    def __init__(self, n_ids: int, context: int, seed: int, *, recurring: float = 0.0) -> None:
        if context < 8:
            raise DataError(f"copy rows: context={context} is too short to repeat a passage; give 8 or more")
        self.n_ids, self.context, self.seed, self.recurring = n_ids, context, seed, recurring

    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        random = generator(self.seed, mixed_key(self.seed, position), 5)
        alphabet = draw_alphabet(random, self.n_ids)
        longest = min(self.context // 2, alphabet)
        length = int(random.integers(min(SHORTEST, self.context // 4), longest + 1))
        passage_L = random.permutation(alphabet)[:length]
        if random.random() < self.recurring:
            few = round(math.exp(random.uniform(math.log(MIN_RECURRING), math.log(length))))
            passage_L = random.choice(passage_L[:few], length)
        ids_S = np.tile(passage_L, -(-(self.context + 1) // length))[: self.context + 1]
        return ids_S[:-1], np.where(np.arange(1, self.context + 1) <= length, IGNORE, ids_S[1:])


def draw_alphabet(random: np.random.Generator, n_ids: int) -> int:
    """Return the number of ids that a row uses, log-uniform between `FEW_IDS` and all ``n_ids``."""
    return round(math.exp(random.uniform(math.log(min(FEW_IDS, n_ids)), math.log(n_ids))))
