"""The two orders of channels that rotate together.

RoPE turns pairs of channels. Meta and GGUF pair neighbours (2i, 2i + 1), Hugging Face and Herd the two halves
(i, i + K/2). Which order q and k have changes no score, as long as both have the same; so at the border the rows of
their matrices are permuted.

Shapes: D model dim (or the bytes of a packed row), K head dim.
"""

from __future__ import annotations

from torch import Tensor


def half_rotation(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, (heads·K, D), from Meta's channel pairs (2i, 2i+1) to (i, i + K/2)."""
    rows, D = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, D).transpose(1, 2).reshape(rows, D)


def interleaved_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `half_rotation`."""
    rows, D = weight.shape
    return weight.view(rows // head_dim, 2, head_dim // 2, D).transpose(1, 2).reshape(rows, D)
