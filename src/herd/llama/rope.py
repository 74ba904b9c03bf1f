"""Rotary position embedding with Llama 3's frequency scaling (RoFormer, arXiv 2104.09864; Llama 3.1
`apply_scaling`).

Weights are in Hugging Face's half-rotation layout: channel i pairs with channel i + K/2. Meta's interleaved
pairs are permuted when weights are imported (`herd.checkpoint.names`), never here.

Shapes: B batch, T time, H heads (query or KV), K head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.pointwise import rotate
from .config import ModelConfig

__all__ = ["inverse_frequencies", "rotate", "rotation"]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotation speed of each channel pair in radians per position; fp32, shape (K/2,)."""
    K = config.head_dim
    freqs = 1.0 / (config.rope_theta ** (torch.arange(0, K, 2, dtype=torch.int64, device="cpu").float() / K))
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    out = torch.where(
        wavelength > scaling.original_context / scaling.low_freq_factor, freqs / scaling.factor, blended
    )
    return torch.where(wavelength < scaling.original_context / scaling.high_freq_factor, freqs, out)


def rotation(inv_freq: Tensor, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every (position, channel) angle, computed in fp32; each (B, T, 1, K) in
    ``dtype``."""
    angles_BTK2 = positions_BT[..., None].float() * inv_freq.float()
    angles_BT1K = torch.cat((angles_BTK2, angles_BTK2), dim=-1)[..., None, :]
    return angles_BT1K.cos().to(dtype), angles_BT1K.sin().to(dtype)
