"""The K formats: blocks of 256 weights, whose groups have small integer scales: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Shapes: R rows, N blocks per row, S weights per block, G groups per block.
Source: ggml ``ggml-common.h``, ``ggml-quants.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .codec import Codec, Fields
from .grids import Levels


class _Q2_K(Codec):
    name, struct = "Q2_K", {"scales": 16, "qs": 64, "d": 2, "m": 2}
    levels, scales, group = Levels(0, 3), Levels(0, 15), 16

    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 2, 32)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qs": pack_bits(codes_RNS, 2, 32)}

    def unpack_scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        return fields["scales"] & 15, fields["scales"] >> 4

    def pack_scales(self, scales_RNG: Tensor, lows_RNG: Tensor | None) -> Fields:
        assert lows_RNG is not None
        return {"scales": scales_RNG | (lows_RNG << 4)}


class _Q3_K(Codec):
    name, struct = "Q3_K", {"hmask": 32, "qs": 64, "scales": 12, "d": 2}
    levels, scales, group = Levels(-4, 3), Levels(-32, 31), 16

    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 2, 32) | (unpack_bits(fields["hmask"], 1, 32) << 2)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"hmask": pack_bits(codes_RNS >> 2, 1, 32), "qs": pack_bits(codes_RNS & 3, 2, 32)}

    def unpack_scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        low, high = fields["scales"].split([8, 4], dim=-1)
        return (unpack_bits(low, 4, 8) | (unpack_bits(high, 2, 4) << 4)).to(torch.int8) - 32, None

    def pack_scales(self, scales_RNG: Tensor, lows_RNG: Tensor | None) -> Fields:
        parts = pack_bits(scales_RNG & 15, 4, 8), pack_bits(scales_RNG >> 4, 2, 4)
        return {"scales": torch.cat(parts, dim=-1)}


class _SixBitScales(Codec):
    """Eight 6-bit scales and eight 6-bit lows in twelve bytes.

    The first four of each are in the low bits of one byte. The last four are split: four bits are in the last
    bytes, and two in the high bits of the first bytes.
    """

    scales = Levels(0, 63)

    def unpack_scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        a, b, c = fields["scales"].split(4, dim=-1)
        scales = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), dim=-1)
        return scales, torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), dim=-1)

    def pack_scales(self, scales_RNG: Tensor, lows_RNG: Tensor | None) -> Fields:
        assert lows_RNG is not None
        (s, s4), (m, m4) = scales_RNG.split(4, dim=-1), lows_RNG.split(4, dim=-1)
        parts = s | ((s4 >> 4) << 6), m | ((m4 >> 4) << 6), (s4 & 15) | ((m4 & 15) << 4)
        return {"scales": torch.cat(parts, dim=-1)}


class _Q4_K(_SixBitScales):
    name, struct, levels = "Q4_K", {"d": 2, "m": 2, "scales": 12, "qs": 128}, Levels(0, 15)

    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 4, 32)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qs": pack_bits(codes_RNS, 4, 32)}


class _Q5_K(_SixBitScales):
    name, struct, levels = "Q5_K", {"d": 2, "m": 2, "scales": 12, "qh": 32, "qs": 128}, Levels(0, 31)

    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 4, 32) | (unpack_bits(fields["qh"], 1, 32) << 4)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qh": pack_bits(codes_RNS >> 4, 1, 32), "qs": pack_bits(codes_RNS & 15, 4, 32)}


class _Q6_K(Codec):
    name, struct = "Q6_K", {"ql": 128, "qh": 64, "scales": 16, "d": 2}
    levels, scales, group = Levels(-32, 31), Levels(-128, 127), 16

    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["ql"], 4, 64) | (unpack_bits(fields["qh"], 2, 32) << 4)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"ql": pack_bits(codes_RNS & 15, 4, 64), "qh": pack_bits(codes_RNS >> 4, 2, 32)}

    def unpack_scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        return fields["scales"].view(torch.int8), None

    def pack_scales(self, scales_RNG: Tensor, lows_RNG: Tensor | None) -> Fields:
        return {"scales": scales_RNG ^ 0x80}  # from 0..255 to two's complement


K_QUANTS = (_Q2_K(), _Q3_K(), _Q4_K(), _Q5_K(), _Q6_K())
