"""Rows that repeat themselves: the shortest way to a model that can look back and copy.

Using a tool is mostly copying: numbers from a question into a call, a result into an answer. What does it is an
induction head ("after A came B before, so B comes after A now"), and in running text a small model meets too few
occasions to form one: loss falls for a million tokens by word frequencies alone. A passage of random tokens that comes
again has nothing else to be learnt by, and as every token of the vocabulary occurs in it, what is learnt holds for rare
ones too. (Olsson et al., "In-context learning and induction heads", 2022, measure such heads with just these rows.)

Row p holds passages of random length over a few random tokens of its own, each said two to four times; the first time
is not trained, as there is nothing to know. Shapes: B rows, T = context.
"""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch
from .shuffle import generator, key
from .stream import as_batch, check_range

SHORTEST, LONGEST = 4, 24
"""Tokens of a passage."""
ALPHABET = 32
"""Different tokens in a row: few, so that each is met often enough to be matched."""


class RepetitionStream:
    """Rows of repeated random passages over ids below ``n_ranks``; an endless pure function of (seed, position)."""

    packed = False

    def __init__(self, n_ranks: int, context: int, seed: int) -> None:
        if context < 2 * SHORTEST:
            raise DataError(
                f"repetition: context={context} does not hold a passage twice; give {2 * SHORTEST} or more"
            )
        self.n_ranks, self.context, self.seed = n_ranks, context, seed
        self.n_rows = 1 << 40  # every position is a row of its own

    def batch(self, position: int, count: int) -> Batch:
        """Rows ``position`` up to ``position + count``."""
        check_range(position, count)
        rows = [self._row(p) for p in range(position, position + count)]
        return as_batch(np.stack([tokens for tokens, _ in rows]), np.stack([targets for _, targets in rows]))

    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and targets of one row, int64 (T,) each."""
        random = generator(self.seed, key(self.seed, position), 5)
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
