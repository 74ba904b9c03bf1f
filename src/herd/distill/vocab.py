"""Give a model a smaller vocabulary, and read its teacher's predictions in that vocabulary.

A student with a trimmed vocabulary reads text in more, shorter tokens. Its teacher can read the same tokens,
as they are a subset of its own, and predicts the next one in its whole vocabulary. The probability of a
dropped token is added to that of its first kept piece (`fold`). This is exact at the end of a token that the
whole vocabulary would have too, and an approximation between the pieces of a dropped token, where the teacher
has never been trained to continue.

Shapes: N tokens, V the teacher's vocabulary, W the student's, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..llama.model import LlamaLM
from ..text import Tokenizer
from ..text.trim import trim_vocabulary


@dataclass(frozen=True)
class VocabCut:
    """A trimmed vocabulary.

    ``kept_W`` are the teacher's ids of the student's tokens, int64. ``first_V`` has, for every id of the
    teacher, the student's id of the token or of its first piece.
    """

    tokenizer: Tokenizer
    kept_W: Tensor
    first_V: Tensor

    @property
    def size(self) -> int:
        """The number of tokens that are kept."""
        return len(self.kept_W)


def cut_vocabulary(tokenizer: Tokenizer, size: int, rows: int) -> VocabCut:
    """Return the trimmed vocabulary of ``size`` tokens for a teacher whose embedding has ``rows`` rows.

    Rows without a token, which pad a vocabulary to a round number, are folded onto id 0. Their probability is
    practically zero.
    """
    trimmed = trim_vocabulary(tokenizer, size)
    padding = [0] * (rows - len(trimmed.first_piece))
    return VocabCut(
        trimmed.tokenizer, torch.tensor(trimmed.kept), torch.tensor(trimmed.first_piece + padding)
    )


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


def fold(probabilities_NV: Tensor, cut: VocabCut) -> Tensor:
    """Return the teacher's probabilities in the student's vocabulary, (N, W)."""
    folded_NW = probabilities_NV.new_zeros(len(probabilities_NV), cut.size)
    return folded_NW.index_add_(1, cut.first_V.to(probabilities_NV.device), probabilities_NV)
