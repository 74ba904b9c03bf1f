"""Make random weights of a model's shape, to measure a machine's speed before a download.

Kernels run at the same speed for all finite numbers. So blocks are filled with random bytes, and then each
stored scale gets a fixed exponent and keeps its random sign and mantissa. The exponent is chosen for weights
of about 1 / sqrt(row length), so that activations neither vanish nor grow. Only one matrix at a time is made,
so the model in bf16 never exists. A matrix depends only on the seed and its index in the file, so a model in
memory and a model in a file are the same.

Shapes: R rows, D weights per row, N = D / block blocks, B bytes of a packed row, H = B / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from .formats import BF16, F16, F32, TYPES, Format, Scheme, tensor_nbytes
from .linear import assemble_model
from .packing import pack_scales

_HALF = (torch.float16, 10, 15)
"""(dtype, bits of the mantissa, bias of the exponent)."""
_FLOATS = {F32: (torch.float32, 23, 127), F16: _HALF, BF16: (torch.bfloat16, 7, 127)}
_SPREAD = {
    TYPES[name]: spread
    for name, spread in {
        "F32": 1.0,
        "F16": 1.0,
        "BF16": 1.0,
        "Q8_0": 74.0,
        "Q4_0": 4.6,
        "Q4_1": 4.6,
        "Q5_0": 9.2,
        "Q5_1": 9.2,
        "Q2_K": 1.1 * 8.8,
        "Q3_K": 2.3 * 18.5,
        "Q4_K": 4.6 * 37.0,
        "Q5_K": 9.2 * 18.0,
        "Q6_K": 18.5 * 9.2,
        "IQ4_NL": 69.0,
        "IQ4_XS": 69.0 * 1.9,
    }.items()
}
"""Root mean square of random weights whose half-precision scale is 1."""
_HALF_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
"""Byte position of a block's half-precision scale, if not 0."""
_MIDDLE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
"""The second scale (of lowest weights) relative to the first: the middle of the codes, for a mean of 0."""


def random_quantized(
    config: ModelConfig,
    plan: Scheme,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> LlamaLM:
    """Return a model of ``config`` with random blocks that computes in ``dtype``.

    ``progress`` is called with the bytes done and the total. Raises `QuantError` if rows do not divide.
    """
    formats, total, done = plan.plan(config), plan.nbytes(config), 0
    shapes = dict(config.param_shapes())
    rows_of = random_rows_of(config, formats, seed)

    def counted(name: str) -> Tensor:
        nonlocal done
        rows_RB = rows_of(name)
        done += tensor_nbytes(shapes[name], formats[name])
        if progress:
            progress(done, total)
        return rows_RB

    return assemble_model(config, formats, counted, dtype)


def random_rows_of(config: ModelConfig, formats: Mapping[str, Format], seed: int) -> Callable[[str], Tensor]:
    """Return a function that returns the random bytes (R, B) of a parameter, the same at every call."""
    shapes = dict(config.param_shapes())
    place = {name: index for index, name in enumerate(shapes)}

    def rows_of(name: str) -> Tensor:
        if len(shapes[name]) == 1:  # norms and biases
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full((1, *shapes[name]), value).view(torch.uint8)
        return random_rows(shapes[name], formats[name], (seed, place[name]))

    return rows_of


def random_rows(shape: Sequence[int], format: Format, seed: int | Sequence[int]) -> Tensor:
    """Return the bytes (R, B) uint8 of a random matrix (R, D).

    Raises `QuantError` for rows that do not divide and for formats without random weights.
    """
    if format not in _SPREAD:
        raise QuantError(
            f"random weights are not made in {format.name}; choose {', '.join(map(str, _SPREAD))}"
        )
    R, D = shape
    size = tensor_nbytes(shape, format)
    bits = np.random.Generator(np.random.SFC64(seed)).integers(-(2**63), 2**63, -(-size // 8), dtype=np.int64)
    rows_RB = torch.from_numpy(bits).view(torch.uint8)[:size].view(R, -1)
    typical = 1 / math.sqrt(D) / _SPREAD[format]
    if format in _FLOATS:
        _scale(rows_RB, *_FLOATS[format], typical)
        return rows_RB
    block_RNB = rows_RB.view(R, -1, format.block_bytes)
    at = _HALF_AT.get(format.name, 0)
    half_RNH = block_RNB.view(torch.int16)[..., at // 2 :]
    _scale(half_RNH[..., :1], *_HALF, typical)
    if format.name in _MIDDLE:
        middle = half_RNH[..., :1].view(torch.float16) * _MIDDLE[format.name]
        half_RNH[..., 1] = middle.view(torch.int16)[..., 0]
    # The lowest weights of the K formats have the same small scales as the steps.
    # Large scales need a step that is too small for half precision, hence the smaller masks.
    if format.name in ("Q4_K", "Q5_K"):
        scales_RN8 = block_RNB[..., 4:12] & (63 if format.name == "Q4_K" else 31)
        block_RNB[..., 4:16] = pack_scales(scales_RN8, scales_RN8)
    elif format.name == "Q2_K":
        block_RNB[..., :16] = (block_RNB[..., :16] & 15) * 17
    elif format.name == "Q6_K":
        block_RNB.view(torch.int8)[..., 192:208] >>= 3
    elif format.name == "IQ4_XS":  # the high bits of every scale are 2, which means 0
        block_RNB[..., 2:4] = 0xAA
        block_RNB[..., 4:8] &= 0x33
    return rows_RB


def _scale(bits: Tensor, dtype: torch.dtype, mantissa: int, bias: int, typical: float) -> None:
    """Set the exponent of random bits, taken as floats, so that their size is about ``typical``."""
    ints_of = {2: torch.int16, 4: torch.int32}
    exponent = max(1, round(math.log2(typical / math.sqrt(7 / 3))) + bias)  # 7/3: mean square of [1, 2)
    ints = bits.view(ints_of[dtype.itemsize])
    sign = -1 << (8 * dtype.itemsize - 1)
    ints &= sign | ((1 << mantissa) - 1)
    ints |= exponent << mantissa
