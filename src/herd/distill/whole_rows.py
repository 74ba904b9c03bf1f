"""Read rows in a trimmed vocabulary as the teacher of that student reads them: in the tokens of the teacher.

A teacher has not been trained to continue a word from the shorter tokens of its student, and predicts them
badly. SmolLM2 with half of its tokens needs 7.4 bits per piece inside a word that it would have as one token.

Shapes: B rows, T time, N places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..data.batch import Batch
from .vocab import VocabCut


@dataclass(frozen=True)
class WholeRows:
    """What the teacher reads for rows in the student's tokens.

    ``batch`` are the rows in the teacher's own tokens, padded at the end. After the student's token t, the
    prediction of the teacher is the one after its token ``source_BT[b, t]``. ``begun`` has the pieces of the
    teacher's token that are known there, for the places (b, t) that are inside of one.
    """

    batch: Batch
    source_BT: Tensor
    begun: dict[tuple[int, int], tuple[int, ...]]

    def begun_at(self, places: Tensor) -> list[tuple[int, ...]]:
        """Return the known pieces at places (N, 2), () at the beginning of a token."""
        return [self.begun.get((b, t), ()) for b, t in places.tolist()]


def read_whole(batch: Batch, cut: VocabCut | None) -> WholeRows:
    """Return the rows of ``batch``, which are in the student's tokens, as the teacher reads them.

    Without ``cut``, student and teacher have the same vocabulary.
    """
    B, T = batch.tokens_BT.shape
    source_BT = torch.arange(T).expand(B, T).clone()
    if cut is None:
        return WholeRows(batch, source_BT, {})
    tokens_BT, positions_BT = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    documents_BT = torch.full((B, T), -1)
    begun = {}
    for b in range(B):
        ids = batch.tokens_BT[b].tolist()
        owners = [0] * T if batch.documents_BT is None else batch.documents_BT[b].tolist()
        n = 0
        for owner, group in groupby(range(T), owners.__getitem__):
            places = list(group)
            first = places[0] if batch.positions_BT is None else int(batch.positions_BT[b, places[0]])
            t, start = places[0], n
            for id_, n_pieces in _whole_tokens(ids[t : places[-1] + 1], cut):
                for k in range(n_pieces):
                    whole = k == n_pieces - 1
                    source_BT[b, t + k] = n if whole else n - 1
                    if not whole:
                        begun[b, t + k] = tuple(ids[t : t + k + 1])
                tokens_BT[b, n], positions_BT[b, n], documents_BT[b, n] = id_, first + n - start, owner
                n, t = n + 1, t + n_pieces
    rows = Batch(
        tokens_BT, torch.zeros_like(tokens_BT),
        None if batch.positions_BT is None else positions_BT,
        None if batch.documents_BT is None else documents_BT,
    )  # fmt: skip
    return WholeRows(rows, source_BT, begun)


def _whole_tokens(ids: Sequence[int], cut: VocabCut) -> Iterator[tuple[int, int]]:
    """Yield the teacher's ids of a document in the student's tokens, and how many of these each covers.

    The first token stays as it is, because nothing comes before it that could predict a longer one.
    """
    special = set(cut.tokenizer.special_tokens.values())
    yield int(cut.kept_W[ids[0]]), 1
    for is_special, group in groupby(ids[1:], special.__contains__):
        stretch = list(group)
        if is_special:
            yield from ((int(cut.kept_W[id_]), 1) for id_ in stretch)
        else:
            yield from _whole_stretch(stretch, cut)


def _whole_stretch(ids: Sequence[int], cut: VocabCut) -> Iterator[tuple[int, int]]:
    """Yield ids as `_whole_tokens` does, for tokens of text without special ones."""
    small, whole = cut.tokenizer, cut.whole
    lengths = [len(small.token_bytes(id_)) for id_ in ids]
    n_ids, n_bytes, n_whole = 0, 0, 0  # student's tokens and bytes done, and bytes of the teacher's tokens
    for id_ in _encode(ids, cut):
        pieces = cut.pieces[id_]
        if n_bytes == n_whole and list(ids[n_ids : n_ids + len(pieces)]) == list(pieces):
            yield id_, len(pieces)
            n_bytes += sum(lengths[n_ids : n_ids + len(pieces)])
            n_ids += len(pieces)
            n_whole = n_bytes
            continue
        n_whole += len(whole.token_bytes(id_))
        while n_ids < len(ids) and n_bytes + lengths[n_ids] <= n_whole:  # split otherwise: read as it is
            yield int(cut.kept_W[ids[n_ids]]), 1
            n_bytes += lengths[n_ids]
            n_ids += 1
    yield from ((int(cut.kept_W[id_]), 1) for id_ in ids[n_ids:])


def _encode(ids: Sequence[int], cut: VocabCut) -> list[int]:
    """Return the teacher's tokens of a text in the student's, or none if it is cut within a character."""
    try:
        text = b"".join(map(cut.tokenizer.token_bytes, ids)).decode()
    except UnicodeDecodeError:
        return []
    return cut.whole.encode_with_offsets(text, continued=True)[0]
