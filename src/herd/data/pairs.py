"""Pack pairs of answers into rows: both answers of a pair share a row, each as a document of its own.

A pair is never divided, because its loss needs both answers. In a packed row the documents 2k and 2k + 1 are
the chosen and the rejected answer of its pair k, each with its prompt. Padding is the last document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from .packing import PackedStream
from .tuning import AnswerPair


class PairStream(PackedStream):
    """Packed rows of pairs. Raises DataError if there is no pair."""

    def __init__(self, pairs: Sequence[AnswerPair], context: int, seed: int, *, pad_id: int) -> None:
        if not pairs:
            raise DataError("pairs: none to train on; give objects with prompt, chosen and rejected")
        self.pairs = list(pairs)
        lengths = [len(pair.chosen.ids) + len(pair.rejected.ids) - 2 for pair in self.pairs]
        super().__init__(lengths, context, seed, pad_id)

    def documents(self, member: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Return ids and mask of the two answers of a pair."""
        pair = self.pairs[member]
        return [(np.array(answer.ids), np.array(answer.mask)) for answer in (pair.chosen, pair.rejected)]
