"""Compute how many bytes the KV cache takes, for cache, receipts and planner. Does not import torch."""

from __future__ import annotations

from ..kernels.page_layout import BYTES, PAGE
from ..llama.config import ModelConfig

PREFILL_TOKENS = 2048
"""Most prompt tokens of one step: enough to fill the matmuls, few enough to keep the activations small."""
LOGIT_BYTES = 64 << 20
"""Most bytes of fp32 logits of known tokens at a time."""


def nbytes(config: ModelConfig, slots: int, context: int, bytes_per_value: float = BYTES["bf16"]) -> int:
    """Return the bytes of a cache for ``slots`` sequences of ``context`` tokens, in full pages.

    ``bytes_per_value`` is one of `BYTES`.
    """
    return slots * n_pages(context) * page_nbytes(config, bytes_per_value)


def page_nbytes(config: ModelConfig, bytes_per_value: float) -> int:
    """Return the bytes of one page: `PAGE` tokens in all layers."""
    return PAGE * config.kv_nbytes_per_token(bytes_per_value)


def n_pages(tokens: int) -> int:
    """Return the number of pages for ``tokens`` tokens of one sequence."""
    return -(-tokens // PAGE)
