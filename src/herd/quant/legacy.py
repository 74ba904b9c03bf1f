"""The formats of 32 weights with one half-precision step: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Without importance of columns, `encode` has the same bits as ggml's reference. These are not always the
nearest points, since the reference divides by the scale before the scale is rounded to half precision.

Shapes: R rows, N blocks per row, S weights per block.
Source: ggml ``ggml-common.h``, ``ggml-quants.c`` (``quantize_row_*_ref``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import half_bytes, pack_bits, unpack_bits
from .codec import Codec, Fields
from .grids import Levels, inverse_step


class _Legacy(Codec):
    def encode(self, x_RD: Tensor, importance_D: Tensor | None) -> Tensor:
        if importance_D is not None:
            return super().encode(x_RD, importance_D)
        header, codes_RNS = self._reference(x_RD.unflatten(1, (-1, 32)))
        return self.join({**header, **self.pack_codes(codes_RNS)})

    def _reference(self, x_RNS: Tensor) -> tuple[Fields, Tensor]:
        """Return the header and the codes of ggml's reference."""
        half = -self.levels.lowest
        d_RN1 = x_RNS.gather(-1, x_RNS.abs().argmax(-1, keepdim=True)) / -half
        codes = (x_RNS * inverse_step(d_RN1) + (half + 0.5)).clamp_(0, 2 * half - 1).to(torch.uint8)
        return {"d": half_bytes(d_RN1)}, codes


class _Affine(_Legacy):
    def _reference(self, x_RNS: Tensor) -> tuple[Fields, Tensor]:
        low_RN1, top = x_RNS.amin(-1, keepdim=True), self.levels.highest
        d_RN1 = (x_RNS.amax(-1, keepdim=True) - low_RN1) / top
        codes = ((x_RNS - low_RN1) * inverse_step(d_RN1) + 0.5).clamp_(0, top).to(torch.uint8)
        return {"d": half_bytes(d_RN1), "m": half_bytes(low_RN1)}, codes


class _FourBits(Codec):
    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 4, 16)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qs": pack_bits(codes_RNS, 4, 16)}


class _FiveBits(Codec):
    def unpack_codes(self, fields: Fields) -> Tensor:
        return unpack_bits(fields["qs"], 4, 16) | (unpack_bits(fields["qh"], 1, 1) << 4)

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qh": pack_bits(codes_RNS >> 4, 1, 1), "qs": pack_bits(codes_RNS & 15, 4, 16)}


class _Q4_0(_FourBits, _Legacy):
    name, struct, levels = "Q4_0", {"d": 2, "qs": 16}, Levels(-8, 7)


class _Q4_1(_FourBits, _Affine):
    name, struct, levels = "Q4_1", {"d": 2, "m": 2, "qs": 16}, Levels(0, 15)


class _Q5_0(_FiveBits, _Legacy):
    name, struct, levels = "Q5_0", {"d": 2, "qh": 4, "qs": 16}, Levels(-16, 15)


class _Q5_1(_FiveBits, _Affine):
    name, struct, levels = "Q5_1", {"d": 2, "m": 2, "qh": 4, "qs": 16}, Levels(0, 31)


class _Q8_0(_Legacy):
    name, struct, levels = "Q8_0", {"d": 2, "qs": 32}, Levels(-128, 127)

    def unpack_codes(self, fields: Fields) -> Tensor:
        return fields["qs"] ^ 0x80  # from two's complement to 0..255

    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        return {"qs": codes_RNS ^ 0x80}

    def _reference(self, x_RNS: Tensor) -> tuple[Fields, Tensor]:
        d_RN1 = x_RNS.abs().amax(-1, keepdim=True) / 127
        scaled = x_RNS * inverse_step(d_RN1)
        size = scaled.abs()
        whole = size.floor()
        # round halves away from zero, as C's roundf does
        rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())
        return {"d": half_bytes(d_RN1)}, (rounded + 128).to(torch.uint8)


LEGACY = (_Q8_0(), _Q4_0(), _Q4_1(), _Q5_0(), _Q5_1())
