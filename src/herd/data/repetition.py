"""Make rows of repeated random passages. They quickly teach a model to look back and copy.

Using a tool is mostly copying: numbers from a question into a call, a result into an answer. Induction heads
do this ("B followed A before, so B follows A now"), and running text gives a small model too few occasions to
form one: for the first million tokens its loss falls by word frequencies alone. A repeated passage of random
tokens can only be predicted by copying, and since every token of the vocabulary occurs in such passages, the
model learns to copy rare tokens too. (Olsson et al., "In-context learning and induction heads", 2022, measure
induction heads with such rows.)

Row p has passages of random length over a few random tokens of its own, each repeated two to four times. The
first occurrence is not trained, because nothing predicts it.

Shapes: B rows, T = context, A alphabet, N tokens.
"""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch
from .shuffle import generator, mixed_key
from .stream import as_batch, check_range

SHORTEST = 4
"""Fewest tokens of a passage."""
LONGEST = 24
"""Most tokens of a passage."""
ALPHABET = 32
"""Number of different tokens in a row: few, so that each occurs often enough to be matched."""


class RepetitionStream:
    """Endless rows of repeated random passages over ids below ``n_ranks``, by (seed, position)."""

    packed = False

    def __init__(self, n_ranks: int, context: int, seed: int) -> None:
        if context < 2 * SHORTEST:
            raise DataError(
                f"repetition: context={context} is too short for a passage twice; give {2 * SHORTEST} or more"
            )
        self.n_ranks, self.context, self.seed = n_ranks, context, seed
        self.n_rows = 1 << 40  # every position is a row of its own

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``."""
        check_range(position, count)
        rows = [self._row(p) for p in range(position, position + count)]
        return as_batch(np.stack([tokens for tokens, _ in rows]), np.stack([targets for _, targets in rows]))

    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of one row, (T,) int64 each."""
        random = generator(self.seed, mixed_key(self.seed, position), 5)
        alphabet_A = random.integers(self.n_ranks, size=ALPHABET)
        pieces, trained, n = [], [], 0
        while n <= self.context:
            length, times = int(random.integers(SHORTEST, LONGEST + 1)), int(random.integers(2, 5))
            pieces.append(np.tile(random.choice(alphabet_A, length), times))
            trained.append(np.arange(length * times) >= length)
            n += length * times
        ids_N = np.concatenate(pieces)[: self.context + 1]
        trained_N = np.concatenate(trained)[: self.context + 1]
        return ids_N[:-1], np.where(trained_N[1:], ids_N[1:], IGNORE)
