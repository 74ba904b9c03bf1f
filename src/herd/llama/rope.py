"""Rotary position embedding and the kinds of scaling that stretch it over longer contexts.

`inverse_frequencies` gives the rotation speed of each channel pair, `rotation` the angles of positions. They
are the only places that know the kinds of `config.RopeScaling`. Everything else passes the scaling through.

Weights are in Hugging Face's half-rotation layout: channel i pairs with channel i + K/2. Meta's interleaved
pairs are permuted when weights are imported (`herd.checkpoint.names`), never here.

Shapes: B batch, T time, H heads (query or KV), K head dim.
Sources: RoFormer (arXiv 2104.09864); Llama 3.1's `apply_scaling`; YaRN (arXiv 2309.00071); transformers
`modeling_rope_utils.py` for the details of "dynamic" and "yarn".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.pointwise import rotate
from .config import ModelConfig, RopeScaling

__all__ = ["inverse_frequencies", "rotate", "rotation"]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotation speed of each channel pair in radians per position, (K/2,) fp32."""
    K, scaling = config.head_dim, config.rope_scaling
    freqs = 1.0 / (config.rope_theta ** (torch.arange(0, K, 2, dtype=torch.int64, device="cpu").float() / K))
    if scaling is None:
        return freqs
    match scaling.kind:
        case "llama3":
            return _llama3(freqs, scaling)
        case "linear":
            return freqs / scaling.factor
        case "yarn":
            return _yarn(freqs, scaling, config.rope_theta)
        case "factors":
            return freqs / torch.tensor(scaling.freq_factors, device="cpu")
    return freqs  # "dynamic" scales only rows that are longer than the context, in `rotation`


def rotation(
    inv_freq: Tensor, positions_BT: Tensor, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles, computed in fp32, each (B, T, 1, K) in ``dtype``."""
    inv_freq = inv_freq.float()
    if scaling is not None and scaling.kind == "dynamic":
        inv_freq = _lengthened(inv_freq, positions_BT, scaling)
    angles_BTK2 = positions_BT[..., None].float() * inv_freq
    angles_BT1K = torch.cat((angles_BTK2, angles_BTK2), dim=-1)[..., None, :]
    cos, sin = angles_BT1K.cos(), angles_BT1K.sin()
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos.to(dtype), sin.to(dtype)


def _llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / freqs
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    out = torch.where(
        wavelength > scaling.original_context / scaling.low_freq_factor, freqs / scaling.factor, blended
    )
    return torch.where(wavelength < scaling.original_context / scaling.high_freq_factor, freqs, out)


def _yarn(freqs: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    K = 2 * len(freqs)

    def pair_that_turns(times: float) -> float:
        """Return the (fractional) index of the pair that turns so often within the original context."""
        return K * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, K - 1)
    width = last - first or 0.001  # as in transformers: no division by zero
    stretched = ((torch.arange(K // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    return freqs / scaling.factor * stretched + freqs * (1 - stretched)


def _lengthened(inv_freq: Tensor, positions_BT: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the speeds (B, 1, K/2) of "dynamic" scaling, whose base grows with the length of each row."""
    length_B1 = (positions_BT.amax(-1, keepdim=True) + 1).clamp(min=scaling.original_context)
    growth_B1 = scaling.factor * length_B1 / scaling.original_context - (scaling.factor - 1)
    n_pairs = inv_freq.shape[-1]
    exponents = torch.arange(n_pairs, device=inv_freq.device) / max(n_pairs - 1, 1)
    return inv_freq * growth_B1[..., None] ** -exponents
