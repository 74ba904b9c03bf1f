"""Give a model a smaller vocabulary, and divide its teacher's predictions among the tokens that are left.

The teacher reads its own tokens (`whole_rows.py`), and its probabilities are divided among their pieces:

- where one of its tokens ends, the probability of the next token goes to its first piece;
- between the pieces of a token, only the tokens that begin with the pieces so far are possible, and the
  probability of each goes to its next piece.

The second rule takes as known that the token has not ended. A student does not know that, and learns how
often it is so from how often it sees it.

Shapes: N tokens, V the teacher's vocabulary, W the student's, D model dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
