"""The formats whose codes select one of sixteen unevenly spaced values: IQ4_NL (32 weights) and IQ4_XS (256).

The values are closer near zero, where most weights are.

Shapes: R rows, N blocks per row, S weights per block, G groups per block.
Source: ggml ``ggml-common.h`` (``kvalues_iq4nl``), ``ggml-quants.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .codec import Codec, Fields
from .grids import Levels

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class _IQ4_NL(Codec):
    name, struct, levels = "IQ4_NL", {"d": 2, "qs": 16}, Levels(-127, 113, VALUES)

    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 4, 16)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qs": pack_bits(codes_RNS, 4, 16)}


class _IQ4_XS(_IQ4_NL):
    name, struct = "IQ4_XS", {"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128}
    scales = Levels(-32, 31)

    def unpack_scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        codes = unpack_bits(fields["scales_l"], 4, 1) | (unpack_bits(fields["scales_h"], 2, 1) << 4)
        return codes.to(torch.int8) - 32, None

    def pack_scales(self, scales_RNG: Tensor, lows_RNG: Tensor | None) -> Fields:
        return {"scales_h": pack_bits(scales_RNG >> 4, 2, 1), "scales_l": pack_bits(scales_RNG & 15, 4, 1)}


IQ4 = (_IQ4_NL(), _IQ4_XS())
