"""Make random weights in a model's real shape, to measure a machine's speed before any weights are
downloaded.

Kernels run at the same speed whatever the numbers are, as long as they stay finite. So blocks are filled with
random bytes, and then each stored scale gets a fixed exponent and keeps its random sign and mantissa. The
exponent is chosen for weights of about 1 / sqrt(row length), with which activations neither vanish nor grow.
Only one matrix at a time is made, so the model in bf16 never exists. A matrix is a pure function of the seed
and its place in the file: a model in memory and one written to a file are the same.

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
from .formats import BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0, Format, Scheme, tensor_nbytes
from .linear import assemble_model
from .packing import pack_scales

_HALF = (torch.float16, 10, 15)
"""(dtype, bits of the mantissa, bias of the exponent)."""
_FLOATS = {F32: (torch.float32, 23, 127), F16: _HALF, BF16: (torch.bfloat16, 7, 127)}
_SPREAD = {
    Q8_0: 74.0,
    **dict.fromkeys((Q4_0, Q4_1), 4.6),
    **dict.fromkeys((Q5_0, Q5_1), 9.2),
    Q4_K: 4.6 * 37.0,
    Q6_K: 18.5 * 9.2,
    **dict.fromkeys((F32, F16, BF16), 1.0),
}
"""Root mean square of random weights whose scale is 1."""


def random_quantized(
    config: ModelConfig,
    plan: Scheme,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> LlamaLM:
    """Return a model of ``config`` with random blocks that computes in ``dtype``.

    ``progress`` is called with (bytes done, bytes in all). Raises `QuantError` where rows do not divide.
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
    """Return a function that gives the random bytes (R, B) of a parameter, the same at every call."""
    shapes = dict(config.param_shapes())
    place = {name: index for index, name in enumerate(shapes)}

    def rows_of(name: str) -> Tensor:
        if len(shapes[name]) == 1:  # norms
            return torch.ones(1, *shapes[name]).view(torch.uint8)
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
    half_RNH = rows_RB.view(torch.int16).view(R, -1, format.block_bytes // 2)
    if format == Q6_K:
        half_RNH.view(torch.int8)[..., 192:208] >>= 3  # scales up to 16: larger ones need too small a step
        _scale(half_RNH[..., -1:], *_HALF, typical)
        return rows_RB
    _scale(half_RNH[..., :1], *_HALF, typical)
    if format in (Q4_1, Q5_1):  # the mean is 0 with a lowest weight of minus the middle of the codes
        middle = 7.5 if format == Q4_1 else 15.5
        half_RNH[..., 1] = (half_RNH[..., :1].view(torch.float16) * -middle).view(torch.int16)[..., 0]
    if format == Q4_K:
        # w = step · s · code - low · s has the mean 0 with low = 7.5 step, the middle of the codes
        half_RNH[..., 1] = (half_RNH[..., :1].view(torch.float16) * 7.5).view(torch.int16)[..., 0]
        scales_RN8 = half_RNH.view(torch.uint8)[..., 4:12] & 63
        half_RNH.view(torch.uint8)[..., 4:16] = pack_scales(scales_RN8, scales_RN8)
    return rows_RB


def _scale(bits: Tensor, dtype: torch.dtype, mantissa: int, bias: int, typical: float) -> None:
    """Set the exponent of random bits, taken as floats, so that their size is about ``typical``."""
    ints_of = {2: torch.int16, 4: torch.int32}
    exponent = max(1, round(math.log2(typical / math.sqrt(7 / 3))) + bias)  # 7/3: mean square of [1, 2)
    ints = bits.view(ints_of[dtype.itemsize])
    sign = -1 << (8 * dtype.itemsize - 1)
    ints &= sign | ((1 << mantissa) - 1)
    ints |= exponent << mantissa
