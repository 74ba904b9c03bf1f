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
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from .bits import half_bytes, halves
from .blocks import CODECS
from .formats import BF16, F16, F32, PLAIN, Format, Scheme, tensor_nbytes
from .linear import assemble_model

_HALF = (torch.float16, 10, 15)
"""(dtype, bits of the mantissa, bias of the exponent)."""
_FLOATS = {F32: (torch.float32, 23, 127), F16: _HALF, BF16: (torch.bfloat16, 7, 127)}


def random_quantized(
    config: ModelConfig,
    plan: Scheme,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> LlamaLM:
    """Return a model of ``config`` with random blocks that computes in ``dtype``.

    ``progress`` is called with the bytes done and the total. Raises `QuantError` if rows have an incomplete
    block.
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

    Raises `QuantError` for rows with an incomplete block and for formats without random weights.
    """
    if format not in _FLOATS and format.name not in CODECS:
        raise QuantError(
            f"random weights are not made in {format.name}; choose {', '.join((*PLAIN, *CODECS))}"
        )
    R, D = shape
    size = tensor_nbytes(shape, format)
    bits = np.random.Generator(np.random.SFC64(seed)).integers(-(2**63), 2**63, -(-size // 8), dtype=np.int64)
    rows_RB = torch.from_numpy(bits).view(torch.uint8)[:size].view(R, -1)
    typical = 1 / math.sqrt(D)
    if format in _FLOATS:
        _scale(rows_RB, *_FLOATS[format], typical)
        return rows_RB
    codec = CODECS[format.name]
    fields = codec.split(rows_RB)
    levels = codec.levels.values
    typical, middle = typical / statistics.pstdev(levels), -statistics.fmean(levels)
    if codec.scales is not None:
        # larger scales would need a step that is too small for half precision
        scales = range(1, 1 + max(3, min(15, int(170 / statistics.pstdev(levels)))))
        typical /= math.sqrt(statistics.fmean(scale * scale for scale in scales))
        middle = -middle  # the lowest weight is -m times an integer
        random_RNG = max(fields.values(), key=lambda field: field.shape[-1])[
            ..., : format.block // codec.group
        ]
        scales_RNG = random_RNG % len(scales) + scales.start
        codes_RNG = (scales_RNG.short() - codec.scales.lowest).to(torch.uint8)
        for field, packed in codec.pack_scales(codes_RNG, codes_RNG).items():
            fields[field].copy_(packed)
    _scale(fields["d"], *_HALF, typical)
    if codec.affine:
        fields["m"].copy_(half_bytes(halves(fields["d"]) * middle))
    return rows_RB


def _scale(bits: Tensor, dtype: torch.dtype, mantissa: int, bias: int, typical: float) -> None:
    """Set the exponent of random bits, taken as floats, so that their size is about ``typical``."""
    ints_of = {2: torch.int16, 4: torch.int32}
    exponent = max(1, round(math.log2(typical / math.sqrt(7 / 3))) + bias)  # 7/3: mean square of [1, 2)
    ints = bits.view(ints_of[dtype.itemsize])
    sign = -1 << (8 * dtype.itemsize - 1)
    ints &= sign | ((1 << mantissa) - 1)
    ints |= exponent << mantissa
