"""Pack small integers into the bits of bytes, and read half-precision numbers from bytes.

Shapes: R rows, N blocks per row, S integers per block, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes_RNS: Tensor, bits: int, lanes: int) -> Tensor:
    """Pack ``8 / bits`` codes into each byte, (R, N, S * bits / 8) uint8.

    ``lanes`` consecutive codes go to consecutive bytes, and the next ``lanes`` codes to the next higher bits
    of the same bytes. All formats of ggml store their codes in this order, each with its own ``lanes``.
    """
    R, N, S = codes_RNS.shape
    groups = codes_RNS.reshape(R, N, -1, 8 // bits, lanes)
    packed = groups[..., 0, :].clone()
    for k in range(1, 8 // bits):
        packed |= groups[..., k, :] << (bits * k)
    return packed.reshape(R, N, S * bits // 8)


def unpack_bits(bytes_RNB: Tensor, bits: int, lanes: int) -> Tensor:
    """Undo `pack_bits`: return the codes, (R, N, B * 8 / bits) uint8."""
    R, N, B = bytes_RNB.shape
    packed = bytes_RNB.reshape(R, N, -1, lanes)
    planes = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(planes, dim=-2).reshape(R, N, B * 8 // bits)


def halves(bytes_RN2: Tensor) -> Tensor:
    """Return half-precision numbers, as fp32, from their bytes in the last dimension."""
    return bytes_RN2.contiguous().view(torch.float16).float()


def half_bytes(numbers: Tensor) -> Tensor:
    """Return the bytes of numbers in half precision, in the last dimension."""
    return numbers.half().contiguous().view(torch.uint8)
