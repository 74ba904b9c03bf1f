"""Measure the cost of quantizing: compare a quantized model with the original on the same text.

The result is stored in the receipt of a quantized folder: KL divergence (mean and 99th percentile over
tokens), how often the most likely token is the same, and both perplexities. Errors can cancel out in the
perplexity, but not in the KL divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from .bpb import compression
from .fidelity import fidelity
from .score import Score
from .windows import HeldOut

BUDGET_FLOPS = 5e12
"""Operations of a measurement: about half a minute on two cores."""
MIN_TOKENS, MAX_TOKENS = 2_048, 100_000


def affordable_tokens(config: ModelConfig) -> int:
    """Return the number of tokens that `BUDGET_FLOPS` pay for, within a minimum and a maximum."""
    return int(min(MAX_TOKENS, max(MIN_TOKENS, BUDGET_FLOPS / config.flops_per_token(512))))


def first_tokens(documents: Sequence[HeldOut], n: int) -> list[HeldOut]:
    """Return the first documents, at least one, until they have ``n`` tokens."""
    out: list[HeldOut] = []
    for document in documents:
        out.append(document)
        n -= len(document.ids) - 1
        if n <= 0:
            break
    return out


def cost_of_quantizing(
    parent: LlamaLM, child: LlamaLM, documents: Sequence[HeldOut], context: int
) -> dict[str, Any]:
    """Return ``kl``, ``top1``, ``overlap`` and ``ppl`` as records with 95 % intervals over documents."""
    scores = fidelity(parent, child, documents, context).scores()
    before, after = (compression(model, documents, context).score() for model in (parent, child))
    ppl_before, ppl_after = (math.exp(score.detail["nats_per_token"]) for score in (before, after))
    scores.append(Score("ppl", ppl_after, "per token", n=after.n, detail={"parent": ppl_before}))
    return {score.name: {k: v for k, v in score.record().items() if k != "name"} for score in scores}
