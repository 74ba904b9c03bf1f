"""Streams of rows: `batch(position, count)` depends only on the data, the seed and the global row number.

So the position in the data is one integer. Row 70,000 is the same row on any number of ranks and after any
number of restarts: rank r of R takes rows ``[position + r*k, position + (r+1)*k)`` of a global batch, and all
ranks together take the same rows in the same order. An epoch is one pass over all rows. Each epoch has a
permutation of its own, which is computed entry by entry (`shuffle.permute`) and never stored.

`TokenStream` splits the concatenated documents of shards into rows, and `MixStream` interleaves streams by
weight. There are more streams in `packing.py` (dialogs), `needle.py` and `repetition.py` (synthetic text).

Shapes: B rows, T = context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from ..errors import DataError
from .batch import IGNORE, Batch, concatenate
from .shards import Shards
from .shuffle import generator, mixed_key, permute


class Stream(Protocol):
    """Rows of tokens by number, ``n_rows`` per epoch. ``packed`` ones carry documents and positions."""

    context: int
    packed: bool
    n_rows: int

    def batch(self, position: int, count: int) -> Batch: ...


class TokenStream:
    """Rows of ``context`` tokens (and their successors) from shards, in another order in every epoch.

    The start of the first row also changes with the epoch, so that rows are split at other positions, and the
    few tokens that do not fill a last row are not always the same.

    With ``documents=True`` rows carry document numbers and restarting positions: attention stays within a
    document, and the last token of a document predicts nothing. Otherwise documents simply follow each other,
    as in most pre-training.
    """

    def __init__(self, shards: Shards, context: int, seed: int, *, documents: bool = False) -> None:
        if context < 1:
            raise DataError(f"context={context} must be at least 1 token")
        if shards.n_tokens < context + 1:
            raise DataError(
                f"{shards.folder}: {shards.n_tokens} tokens do not fill one row of {context} + 1; "
                "give more text or a shorter context"
            )
        self.shards, self.context, self.seed, self.packed = shards, context, seed, documents
        self.n_rows = (shards.n_tokens - 1) // context
        self._slack = (shards.n_tokens - 1) % context
        self._starts_D = np.asarray(shards.documents_D["start"])

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``."""
        starts_B = self.starts(position, count)
        rows_BS = np.stack([self.shards.tokens(int(s), int(s) + self.context + 1) for s in starts_B])
        tokens_BT, targets_BT = rows_BS[:, :-1], rows_BS[:, 1:]
        if not self.packed:
            return as_batch(tokens_BT, targets_BT)
        index_BS = starts_B[:, None] + np.arange(self.context + 1)
        document_BS = np.searchsorted(self._starts_D, index_BS, side="right") - 1
        # A row may begin inside a document: its positions count from the row's first token.
        begin_BT = np.maximum(self._starts_D[document_BS[:, :-1]], starts_B[:, None])
        targets_BT = np.where(document_BS[:, 1:] == document_BS[:, :-1], targets_BT, IGNORE)
        documents_BT = document_BS[:, :-1] - document_BS[:, :1]
        return as_batch(tokens_BT, targets_BT, index_BS[:, :-1] - begin_BT, documents_BT)

    def starts(self, position: int, count: int) -> np.ndarray:
        """Return the index of the first token of each of these rows, (B,) int64."""
        check_range(position, count)
        epoch_B, index_B = np.divmod(np.arange(position, position + count, dtype=np.int64), self.n_rows)
        starts_B = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epoch_B):
            here_B = epoch_B == epoch
            shift = int(generator(self.seed, int(epoch), 1).integers(self._slack + 1))
            rows_B = permute(index_B[here_B], self.n_rows, mixed_key(self.seed, int(epoch)))
            starts_B[here_B] = rows_B * self.context + shift
        return starts_B


class MixStream:
    """Rows of several streams interleaved by weight. No row is left out, and each stream keeps its order.

    Positions are grouped in blocks. In a block each stream has a fixed number of rows, at positions shuffled
    by the block's number. So the number of a stream's rows before a position is a product and a short count.
    """

    BLOCKS = (10, 20, 50, 100, 200, 500, 1000)

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int) -> None:
        if not streams or len(streams) != len(weights):
            raise DataError(f"mix: {len(streams)} streams and {len(weights)} weights; give one weight each")
        if not all(np.isfinite(weights)) or min(weights) <= 0:
            raise DataError(f"mix: weights {list(weights)} must be positive; leave out a stream of weight 0")
        contexts = sorted({stream.context for stream in streams})
        if len(contexts) > 1:
            raise DataError(f"mix: streams of contexts {contexts}; give all the same")
        self.streams, self.seed, self.context = list(streams), seed, contexts[0]
        self.packed = any(stream.packed for stream in streams)
        fraction_P = np.asarray(weights, dtype=np.float64) / sum(weights)
        exact = (k for k in self.BLOCKS if np.allclose(fraction_P * k, np.round(fraction_P * k), atol=1e-6))
        self.block = next(exact, self.BLOCKS[-1])
        self.quota_P = _largest_remainder(fraction_P, self.block)
        if self.quota_P.min() == 0:
            raise DataError(
                f"mix: weights {list(weights)} give a stream less than 1 row in {self.block}; raise it"
            )
        self._parts_K = np.repeat(np.arange(len(streams)), self.quota_P)
        # an epoch of the mixture ends when the first stream ends
        self.n_rows = int(min(s.n_rows * self.block // q for s, q in zip(streams, self.quota_P, strict=True)))

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count`` of the mixture."""
        check_range(position, count)
        first = position // self.block
        blocks = range(first, (position + count - 1) // self.block + 1)
        part_N = np.concatenate([self._order(block) for block in blocks])  # the stream of each row
        offset = position - first * self.block
        part_B = part_N[offset : offset + count]
        batches, row_indices = [], []
        for number, stream in enumerate(self.streams):
            rows_B = np.flatnonzero(part_B == number)
            if len(rows_B):
                before = first * int(self.quota_P[number]) + int((part_N[:offset] == number).sum())
                batch = stream.batch(before, len(rows_B))
                batches.append(_with_documents(batch) if self.packed else batch)
                row_indices.append(rows_B)
        order = torch.from_numpy(np.argsort(np.concatenate(row_indices)))
        return concatenate(batches).map(lambda tensor: tensor[order])

    def _order(self, block: int) -> np.ndarray:
        return self._parts_K[permute(np.arange(self.block), self.block, mixed_key(self.seed, block, 2))]


class EndlessRows(ABC):
    """A stream in which every position is a row of its own."""

    n_rows = 1 << 40
    packed = False

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``."""
        check_range(position, count)
        rows = [self._row(p) for p in range(position, position + count)]
        return as_batch(np.stack([tokens for tokens, _ in rows]), np.stack([targets for _, targets in rows]))

    @abstractmethod
    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of one row, (T,) int64 each."""


def first_rows(stream: Stream, n_rows: int, at_once: int) -> list[Batch]:
    """Return the first ``n_rows`` rows of a stream, or an epoch if shorter, in batches of ``at_once``."""
    n_rows = min(n_rows, stream.n_rows)
    return [stream.batch(start, min(at_once, n_rows - start)) for start in range(0, n_rows, at_once)]


def check_range(position: int, count: int) -> None:
    """Raise DataError for a negative position or a count below 1."""
    if position < 0 or count < 1:
        raise DataError(f"stream: position={position} must be at least 0, and count={count} at least 1")


def as_batch(
    tokens_BT: np.ndarray,
    targets_BT: np.ndarray,
    positions_BT: np.ndarray | None = None,
    documents_BT: np.ndarray | None = None,
) -> Batch:
    """Return a `Batch` of int64 tensors from numpy arrays of one shape."""
    arrays = (tokens_BT, targets_BT, positions_BT, documents_BT)
    tensors = (None if a is None else torch.from_numpy(np.array(a, dtype=np.int64)) for a in arrays)
    return Batch(*tensors)  # type: ignore[arg-type]


def _with_documents(batch: Batch) -> Batch:
    """Return the batch with documents and positions: a plain row is one document with positions 0..T-1."""
    if batch.documents_BT is not None:
        return batch
    positions_BT = torch.arange(batch.tokens_BT.shape[1]).expand_as(batch.tokens_BT).clone()
    documents_BT = torch.zeros_like(batch.tokens_BT)
    return replace(batch, positions_BT=positions_BT, documents_BT=documents_BT)


def _largest_remainder(fraction_P: np.ndarray, total: int) -> np.ndarray:
    quota_P = np.floor(fraction_P * total + 1e-9).astype(np.int64)
    rest_P = fraction_P * total - quota_P
    quota_P[np.argsort(-rest_P, kind="stable")[: total - int(quota_P.sum())]] += 1
    return quota_P
