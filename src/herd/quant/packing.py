"""Pack codes, steps and lowest values into the bits of blocks, unpack them, and describe their grid.

Shapes: R rows, D weights per row, N = D / block blocks, G groups per row, S weights per group, B bytes.
Source: ggml ``ggml-common.h``, ``ggml-quants.c``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Q5_0, Q5_1, Q6_K, Q8_0, Format


@dataclass(frozen=True)
class Grid:
    """The values of weights: ``step_RG * code + low_RG`` for codes 0..``top``, in groups of D / G weights.

    ``header_RNB`` are the bytes of steps and lowest values in the blocks.
    """

    format: Format
    step_RG: Tensor
    low_RG: Tensor
    top: int
    header_RNB: Tensor

    def codes(self, x_RD: Tensor) -> Tensor:
        """Return the nearest code of every weight, (R, D) uint8."""
        R, D = x_RD.shape
        x_RGS = x_RD.float().reshape(R, self.step_RG.shape[1], -1)
        inverse_RG = torch.where(self.step_RG == 0, 0, 1 / self.step_RG)
        codes_RGS = ((x_RGS - self.low_RG[..., None]) * inverse_RG[..., None]).round_().clamp_(0, self.top)
        return codes_RGS.to(torch.uint8).reshape(R, D)

    def values(self, codes_RD: Tensor) -> Tensor:
        """Return the weights of these codes, (R, D) fp32."""
        codes_RGS = codes_RD.float().reshape(codes_RD.shape[0], self.step_RG.shape[1], -1)
        return (codes_RGS * self.step_RG[..., None] + self.low_RG[..., None]).reshape(codes_RD.shape)


def pack_codes(codes_RD: Tensor, grid: Grid) -> Tensor:
    """Return the bytes (R, B) uint8 of codes (R, D) uint8 on a grid."""
    R, N = grid.header_RNB.shape[:2]
    codes_RNS = codes_RD.reshape(R, N, -1)
    if grid.format == Q6_K:
        parts = [pack_q6(codes_RNS), grid.header_RNB]
    elif grid.format == Q8_0:
        parts = [grid.header_RNB, codes_RNS ^ 0x80]  # code - 128 in two's complement
    elif grid.format in (Q5_0, Q5_1):
        parts = [grid.header_RNB, pack_fifth_bits(codes_RNS >> 4), pack_nibbles(codes_RNS & 15)]
    else:
        parts = [grid.header_RNB, pack_nibbles(codes_RNS)]
    return torch.cat(parts, dim=-1).reshape(R, -1)


def pack_nibbles(codes_RNS: Tensor) -> Tensor:
    """Pack two codes per byte: of each 32 (Q4_0) or 64 (Q4_K) codes, the first half in the low bits."""
    R, N, S = codes_RNS.shape
    pairs = codes_RNS.reshape(R, N, -1, 2, 16 if S == 32 else 32)
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).reshape(R, N, S // 2)


def unpack_nibbles(bytes_RNB: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    R, N, B = bytes_RNB.shape
    packed = bytes_RNB.reshape(R, N, -1, 16 if B == 16 else 32)
    return torch.stack((packed & 15, packed >> 4), dim=-2).reshape(R, N, 2 * B)


def pack_fifth_bits(bits_RNS: Tensor) -> Tensor:
    """Pack 32 single bits in four bytes, the first bit lowest, (R, N, 4) uint8."""
    places = torch.arange(8, dtype=torch.uint8, device=bits_RNS.device)
    return (bits_RNS.unflatten(-1, (4, 8)) << places).sum(-1, dtype=torch.uint8)


def unpack_fifth_bits(bytes_RN4: Tensor) -> Tensor:
    """Undo `pack_fifth_bits`: return the bits, (R, N, 32) uint8."""
    places = torch.arange(8, dtype=torch.uint8, device=bytes_RN4.device)
    return ((bytes_RN4[..., None] >> places) & 1).flatten(-2)


def pack_q6(codes_RNS: Tensor) -> Tensor:
    """Pack each 128 codes, as four rows of 32: their low four bits in 64 bytes, their high two in 32."""
    R, N, _ = codes_RNS.shape
    rows = codes_RNS.reshape(R, N, 2, 4, 32)
    low, high = rows & 15, rows >> 4
    ql = low[..., :2, :] | (low[..., 2:, :] << 4)
    qh = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    return torch.cat((ql.reshape(R, N, 128), qh.reshape(R, N, 64)), dim=-1)


def unpack_q6(bytes_RNB: Tensor) -> Tensor:
    """Undo `pack_q6`: return the codes, (R, N, 256)."""
    R, N, _ = bytes_RNB.shape
    ql = bytes_RNB[..., :128].reshape(R, N, 2, 2, 32)
    qh = bytes_RNB[..., 128:192].reshape(R, N, 2, 1, 32)
    low = torch.cat((ql & 15, ql >> 4), dim=-2)
    high = torch.cat([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2)
    return (low | (high << 4)).reshape(R, N, 256)


def halves(bytes_RN2: Tensor) -> Tensor:
    """Return half-precision numbers, as fp32, from their bytes in the last dimension."""
    return bytes_RN2.contiguous().view(torch.float16).float()


def pack_scales(scales_RN8: Tensor, lows_RN8: Tensor) -> Tensor:
    """Pack eight 6-bit scales and eight 6-bit lows in Q4_K's twelve bytes, (R, N, 12) uint8.

    The first four of each are in the low bits of one byte. The last four are split: four bits are in the last
    bytes, and two in the high bits of the first bytes.
    """
    (s, s4), (m, m4) = scales_RN8.split(4, dim=-1), lows_RN8.split(4, dim=-1)
    return torch.cat((s | ((s4 >> 4) << 6), m | ((m4 >> 4) << 6), (s4 & 15) | ((m4 & 15) << 4)), dim=-1)


def unpack_scales(bytes_RNB: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack_scales`: return scales and lows, each (R, N, 8) uint8."""
    a, b, c = bytes_RNB[..., :4], bytes_RNB[..., 4:8], bytes_RNB[..., 8:]
    scales = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), dim=-1)
    lows = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), dim=-1)
    return scales, lows
