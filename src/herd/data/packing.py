"""Pack dialogs into rows: several short dialogs share one row, each as a document of its own.

Dialogs differ much in length. With one dialog per row, most of a row would be padding. Best-fit packing
(longest first, each dialog into the fullest row with enough room) fills rows to well over 95 %. Document
numbers and restarting positions keep dialogs from attending to each other (Llama 3 paper, section 3.2), so a
packed dialog has exactly the same loss and gradient as alone. Dialogs are packed once, and every epoch
permutes the rows.

Targets come from the renderer's mask, shifted: the token at position t predicts the token at t + 1 if that is
trained. The last token of a dialog is only a target, so a dialog of n tokens takes n - 1 positions.

Shapes: B rows, T = context.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch
from .shuffle import epoch_row, mixed_key, permute
from .stream import as_batch, check_range
from .text_files import DataWarning


class PackedStream(ABC):
    """Rows that several documents share. Every epoch has another order of the rows.

    ``lengths`` are the positions that each member takes. The documents of a member stay in one row.
    ``pad_id`` fills the rest of a row. Padding is a document of its own and never a target.
    """

    packed = True

    def __init__(self, lengths: Sequence[int], context: int, seed: int, pad_id: int) -> None:
        self.context, self.seed, self.pad_id = context, seed, pad_id
        # equal lengths are in random order, so that a row does not have a single kind of document only
        order = permute(np.arange(len(lengths)), len(lengths), mixed_key(seed, 3))
        self.rows = pack_rows(lengths, context, order.tolist())
        self.n_rows = len(self.rows)

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``, with documents and positions."""
        check_range(position, count)
        return as_batch(*np.stack([self._row(at) for at in range(position, position + count)], axis=1))

    def members(self, position: int) -> list[int]:
        """Return the members in the row at a position of the stream."""
        return self.rows[epoch_row(position, self.n_rows, self.seed)]

    @abstractmethod
    def documents(self, member: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Return ids and mask of each document of a member."""

    def _row(self, position: int) -> np.ndarray:
        """Return tokens, targets, positions and documents of a packed row, (4, T) int64."""
        tokens_T = np.full(self.context, self.pad_id, dtype=np.int64)
        targets_T = np.full(self.context, IGNORE, dtype=np.int64)
        positions_T, documents_T = np.zeros((2, self.context), dtype=np.int64)
        documents = [each for member in self.members(position) for each in self.documents(member)]
        at = 0
        for number, (ids_N, mask_N) in enumerate(documents):
            end = at + len(ids_N) - 1
            tokens_T[at:end] = ids_N[:-1]
            targets_T[at:end] = np.where(mask_N[1:], ids_N[1:], IGNORE)
            positions_T[at:end] = np.arange(end - at)
            documents_T[at:end] = number
            at = end
        positions_T[at:] = np.arange(self.context - at)
        documents_T[at:] = len(documents)
        return np.stack([tokens_T, targets_T, positions_T, documents_T])


class DialogStream(PackedStream):
    """Packed rows of rendered dialogs.

    ``dialogs`` are objects with ``ids`` and ``mask``, or (ids, mask) pairs. The mask is True for tokens that
    are trained. Dialogs of more than ``context + 1`` tokens are left out, with one warning that counts them.
    Raises DataError if no dialog remains.
    """

    def __init__(self, dialogs: Iterable[Any], context: int, seed: int, *, pad_id: int) -> None:
        if context < 1:
            raise DataError(f"context={context} must be at least 1 token")
        self.dialogs: list[tuple[np.ndarray, np.ndarray]] = []
        longest, n_long = 0, 0
        for number, dialog in enumerate(dialogs):
            ids_N, mask_N = _arrays(dialog, number)
            if len(ids_N) > context + 1:
                n_long, longest = n_long + 1, max(longest, len(ids_N))
            else:
                self.dialogs.append((ids_N, mask_N))
        if not self.dialogs:
            too_long = f" ({n_long} are longer than the context of {context} tokens)" if n_long else ""
            raise DataError(f"dialogs: none to train on{too_long}; give dialogs, or a longer context")
        if n_long:
            some = f"{n_long} of {n_long + len(self.dialogs)} dialogs that are longer than context={context}"
            note = f"left out {some} (the longest has {longest} tokens)"
            warnings.warn(note, DataWarning, stacklevel=2)
        super().__init__([len(ids_N) - 1 for ids_N, _ in self.dialogs], context, seed, pad_id)

    def documents(self, member: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Return ids and mask of a dialog."""
        return [self.dialogs[member]]


def pack_rows(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Return the indices of each row by best-fit decreasing. A row's lengths sum to at most ``capacity``.

    ``order`` breaks ties between equal lengths. Every index is in exactly one row.
    """
    if lengths and max(lengths) > capacity:
        raise DataError(f"packing: a length of {max(lengths)} exceeds the row's {capacity}; leave it out")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, row), sorted: bisection finds the fullest row that fits
    for member in sorted(order, key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[member], -1))
        if at == len(room):
            rows.append([member])
            free, row = capacity - lengths[member], len(rows) - 1
        else:
            free, row = room.pop(at)
            rows[row].append(member)
            free -= lengths[member]
        if free:
            insort(room, (free, row))
    return rows


def _arrays(dialog: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = (dialog.ids, dialog.mask) if hasattr(dialog, "ids") else dialog
    ids_N, mask_N = np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool)
    if ids_N.shape != mask_N.shape or ids_N.ndim != 1:
        raise DataError(
            f"dialog {number}: {ids_N.shape} ids and {mask_N.shape} mask; give one entry per token"
        )
    if len(ids_N) < 2 or not mask_N[1:].any():
        raise DataError(f"dialog {number}: none of its {len(ids_N)} tokens is trained; give it an answer")
    return ids_N, mask_N
