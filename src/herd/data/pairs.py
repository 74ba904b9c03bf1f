"""Pack pairs of answers into rows: both answers of a pair share a row, each as a document of its own.

A pair is never divided, because its loss needs both answers. In a packed row the documents 2k and 2k + 1 are
the chosen and the rejected answer of its pair k, each with its prompt. Padding is the last document.

Shapes: B rows, T = context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from ..text import Rendered
from .batch import IGNORE, Batch
from .packing import pack_rows
from .shuffle import mixed_key, permute
from .stream import as_batch, check_range
from .tuning import AnswerPair


class PairStream:
    """Packed rows of pairs. Every epoch permutes the rows. Raises DataError if there is no pair."""

    packed = True

    def __init__(self, pairs: Sequence[AnswerPair], context: int, seed: int, *, pad_id: int) -> None:
        if not pairs:
            raise DataError("pairs: none to train on; give objects with prompt, chosen and rejected")
        self.context, self.seed, self.pad_id, self.pairs = context, seed, pad_id, list(pairs)
        lengths = [len(pair.chosen.ids) + len(pair.rejected.ids) - 2 for pair in self.pairs]
        order = permute(np.arange(len(self.pairs)), len(self.pairs), mixed_key(seed, 3))
        self.rows = pack_rows(lengths, context, order.tolist())
        self.n_rows = len(self.rows)

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``, with documents and positions."""
        check_range(position, count)
        numbers = [self.row_number(index) for index in range(position, position + count)]
        return as_batch(*np.stack([self._row(number) for number in numbers], axis=1))

    def row_number(self, position: int) -> int:
        """Return the index in ``rows`` of the row at a position of the stream."""
        epoch, row = divmod(position, self.n_rows)
        return int(permute(np.array([row]), self.n_rows, mixed_key(self.seed, epoch))[0])

    def _row(self, number: int) -> np.ndarray:
        """Return tokens, targets, positions and documents of a packed row, (4, T) int64."""
        answers: list[Rendered] = []
        for member in self.rows[number]:
            answers += [self.pairs[member].chosen, self.pairs[member].rejected]
        out = np.zeros((4, self.context), dtype=np.int64)
        out[0], out[1] = self.pad_id, IGNORE
        at = 0
        for document, answer in enumerate(answers):
            ids_N, mask_N = np.array(answer.ids), np.array(answer.mask)
            end = at + len(ids_N) - 1
            out[0, at:end] = ids_N[:-1]
            out[1, at:end] = np.where(mask_N[1:], ids_N[1:], IGNORE)
            out[2, at:end] = np.arange(end - at)
            out[3, at:end] = document
            at = end
        out[2, at:] = np.arange(self.context - at)
        out[3, at:] = len(answers)
        return out
