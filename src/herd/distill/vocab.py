"""Give a model a smaller vocabulary, and read its teacher's predictions in that vocabulary.

A student with a trimmed vocabulary reads text in more, shorter tokens. Its teacher has not been trained to
continue a word from such pieces, and predicts them badly (in SmolLM2 with half of its tokens, 7.4 bits per
piece inside a word that it would have as one token). So the teacher reads its own tokens (`read_whole`), and
its probabilities are divided among the pieces:

- where one of its tokens ends, the probability of the next token goes to its first piece;
- between the pieces of a token, only the tokens that begin with the pieces so far are possible, and the
  probability of each goes to its next piece.

The second rule takes as known that the token has not ended. A student does not know that, and learns how
often it is so from how often it sees it.

Shapes: B rows, T time, N tokens, V the teacher's vocabulary, W the student's, D model dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import ConfigError
from ..llama.model import LlamaLM
from ..text import Tokenizer
from ..text.trim import trim_vocabulary

TINY = 1e-30
"""Added to probabilities before they are divided by their sum."""


@dataclass(frozen=True)
class VocabCut:
    """A trimmed vocabulary.

    ``tokenizer`` is the student's and ``whole`` the teacher's. ``kept_W`` are the teacher's ids of the
    student's tokens, int64. ``pieces`` has, for every id of the teacher, the student's ids that its token is
    split into.
    """

    tokenizer: Tokenizer
    whole: Tokenizer
    kept_W: Tensor
    pieces: Sequence[Sequence[int]]

    @property
    def size(self) -> int:
        """The number of tokens that are kept."""
        return len(self.kept_W)

    @cached_property
    def first_V(self) -> Tensor:
        """The student's id of the first piece of every token of the teacher, int64."""
        return torch.tensor([pieces[0] for pieces in self.pieces])

    @cached_property
    def continuations(self) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
        """For pieces that a token may begin with: the teacher's ids of such tokens, and their next pieces."""
        found: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for id_, pieces in enumerate(self.pieces):
            for n in range(1, len(pieces)):
                found[tuple(pieces[:n])].append((id_, pieces[n]))
        return {begun: tuple(torch.tensor(pairs).T) for begun, pairs in found.items()}  # type: ignore[misc]


def cut_vocabulary(
    tokenizer: Tokenizer, size: int, rows: int, counts: Mapping[int, int] | None = None
) -> VocabCut:
    """Return the trimmed vocabulary of ``size`` tokens for a teacher whose embedding has ``rows`` rows.

    ``counts`` are the occurrences of ids in the text whose tokens are to be kept first. Rows without a token,
    which pad a vocabulary to a round number, are folded onto id 0. Their probability is practically zero.
    """
    trimmed = trim_vocabulary(tokenizer, size, counts)
    padding = [[0]] * (rows - len(trimmed.pieces))
    return VocabCut(trimmed.tokenizer, tokenizer, torch.tensor(trimmed.kept), [*trimmed.pieces, *padding])


@torch.no_grad()
def trim_model(model: LlamaLM, cut: VocabCut) -> LlamaLM:
    """Return a copy of ``model`` that has only the rows of the kept tokens in its embedding and head."""
    if len(cut.first_V) != model.config.vocab_size:
        raise ConfigError(
            f"the vocabulary was trimmed for a model of {len(cut.first_V):,} tokens, this one has "
            f"{model.config.vocab_size:,}: trim the tokenizer that belongs to it"
        )
    with torch.device(model.device):
        student = LlamaLM(model.config.replace(vocab_size=cut.size)).to(model.dtype)
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    weights = model.state_dict()
    student.load_state_dict({n: w[cut.kept_W] if n in rows else w for n, w in weights.items()})
    return student


def fold(probabilities_NV: Tensor, cut: VocabCut, begun: Sequence[tuple[int, ...]] = ()) -> Tensor:
    """Return the teacher's probabilities in the student's vocabulary, (N, W).

    ``begun`` has for every row the pieces of the teacher's token that are known, () at its beginning.
    """
    folded_NW = probabilities_NV.new_zeros(len(probabilities_NV), cut.size)
    folded_NW.index_add_(1, cut.first_V.to(probabilities_NV.device), probabilities_NV)
    for n, pieces in enumerate(begun):
        if pieces:
            ids, following = (found.to(probabilities_NV.device) for found in cut.continuations[pieces])
            possible = probabilities_NV[n, ids] + TINY
            folded_NW[n] = 0
            folded_NW[n].index_add_(0, following, possible / possible.sum())
    return folded_NW


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

    def after(self, places: Tensor) -> list[tuple[int, ...]]:
        """Return the known pieces at places (N, 2), () at the beginning of a token."""
        return [self.begun.get((b, t), ()) for b, t in places.tolist()]


def read_whole(batch: Batch, cut: VocabCut | None) -> WholeRows:
    """Return the rows of ``batch``, which are in the student's tokens, as the teacher reads them.

    ``cut`` None: student and teacher have the same vocabulary.
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
