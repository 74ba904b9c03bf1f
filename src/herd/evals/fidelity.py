"""Fidelity of a model to its teacher: KL(teacher || student), top-1 agreement, overlap of distributions.

Loss on text measures how good a student is. Fidelity measures how closely it follows *its teacher* on each
token of the same text, and whether it can be the teacher's draft model: speculative decoding accepts a draft
token with probability 1 - TV (Leviathan et al., arXiv 2211.17192). Logits of both models are computed for one
chunk of tokens at a time.

Shapes: B rows, T tokens, N scored tokens, C tokens of a chunk, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, DataError
from ..llama.model import LlamaLM
from .bootstrap import ratio_interval
from .bpb import chunk_tokens
from .score import Score, from_interval
from .windows import HeldOut, windows


@dataclass(frozen=True)
class Fidelity:
    """Sums over the ``n_tokens`` tokens of each document.

    ``kl`` is in nats, ``agree`` counts tokens with the same most likely choice, ``overlap`` sums 1 - TV.
    ``token_kl`` is the KL divergence of every single token.
    """

    kl: NDArray[np.float64]
    agree: NDArray[np.float64]
    overlap: NDArray[np.float64]
    n_tokens: NDArray[np.float64]
    token_kl: NDArray[np.float32]

    def scores(self, seed: int = 0) -> list[Score]:
        """Return ``kl`` (with 99th percentile), ``top1`` and ``overlap``, with intervals over documents."""
        n = len(self.n_tokens)
        detail = {"p99": float(np.quantile(self.token_kl, 0.99)), "n_tokens": int(self.n_tokens.sum())}
        return [
            from_interval("kl", ratio_interval(self.kl, self.n_tokens, seed=seed), "nats/token", n, detail),
            from_interval("top1", ratio_interval(self.agree, self.n_tokens, seed=seed), "fraction", n),
            from_interval("overlap", ratio_interval(self.overlap, self.n_tokens, seed=seed), "fraction", n),
        ]


@torch.inference_mode()
def fidelity(
    teacher: LlamaLM, student: LlamaLM, documents: Sequence[HeldOut], context: int | None = None
) -> Fidelity:
    """Compare two models with one vocabulary on the same tokens.

    ``context`` defaults to the shorter of the two.
    """
    if teacher.config.vocab_size != student.config.vocab_size:
        raise ConfigError(
            f"teacher has vocab_size={teacher.config.vocab_size}, student {student.config.vocab_size}: "
            "fidelity needs one tokenizer for both"
        )
    documents = [document for document in documents if len(document.ids) > 1]
    if not documents:
        raise DataError("no held-out document has a token to predict")
    context = context or min(teacher.config.max_context, student.config.max_context)
    sums = torch.zeros(4, len(documents), dtype=torch.float64)
    token_kl = []
    for batch in windows(documents, context, teacher.device):
        scored_BT = batch.targets_BT != -100
        hidden = [
            model(batch.tokens_BT)[scored_BT].split(chunk_tokens(teacher)) for model in (teacher, student)
        ]
        owner_N = batch.document_B[:, None].expand(scored_BT.shape)[scored_BT.cpu()]
        parts = [compare_logits(teacher.lm_head(t), student.lm_head(s)) for t, s in zip(*hidden, strict=True)]
        values_3N = torch.cat(parts, dim=1).cpu()
        sums.index_add_(1, owner_N, torch.cat((values_3N, torch.ones(1, values_3N.shape[1]))).double())
        token_kl.append(values_3N[0].numpy())
    kl, agree, overlap, n_tokens = sums.numpy()
    return Fidelity(kl, agree, overlap, n_tokens, np.concatenate(token_kl))


def compare_logits(teacher_CV: Tensor, student_CV: Tensor) -> Tensor:
    """Return KL divergence, equality of the argmax, and 1 - TV of every token: (3, C) fp32."""
    log_p_CV, log_q_CV = (x.float().log_softmax(-1) for x in (teacher_CV, student_CV))
    p_CV, q_CV = log_p_CV.exp(), log_q_CV.exp()
    kl_C = (p_CV * (log_p_CV - log_q_CV)).sum(-1).clamp_(min=0)  # rounding may make it negative
    agree_C = (log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).float()
    return torch.stack((kl_C, agree_C, torch.minimum(p_CV, q_CV).sum(-1)))
