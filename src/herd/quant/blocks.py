"""Convert weights to GGUF's blocks and back, exactly as ggml does.

Every format here is an affine grid: a group of weights has a step and a lowest value, each weight is stored
as a small integer ``code``, and its value is ``step * code + low``. The formats differ in the number of
codes, the length of a group, and the storage of step and low. So encoding has three steps, and GPTQ replaces
the second one:

    grid = fit_grid(x_RD, format)      the best grid, as it will be stored
    codes = grid.codes(x_RD)           the nearest point for each weight
    blocks = pack_codes(codes, grid)   bytes

For formats of 32 weights, `encode` has the same bits as ggml's reference. These are not always the nearest
points, since the reference divides by the scale before the scale is rounded to half precision. Rows are
processed in pieces that fit into the CPU's cache.

Shapes: R rows, D weights per row, N = D / block blocks, G groups per row, S weights per group.
Source: ggml ``ggml-quants.c`` (``quantize_row_*_ref``, ``dequantize_row_*``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..dtypes import torch_dtype
from ..errors import QuantError
from .formats import FORMATS, PLAIN, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0, Format, require_fit
from .grids import best_grid
from .packing import Grid, halves, pack_codes, unpack_fifth_bits, unpack_nibbles, unpack_q6, unpack_scales

__all__ = ["Grid", "decode", "encode", "fit_grid", "pack_codes"]

PIECE = 1 << 18
"""Number of weights that are encoded or decoded at a time."""
SCANNED = 1 << 20
"""Number of blocks whose scales are checked at a time: enough for all threads."""
_SCALES = {
    **dict.fromkeys(("F16", "Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"), (1,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (1, 3)),
    "Q2_K": (81, 83),
    "Q3_K": (109,),
    "Q6_K": (209,),
}
"""Positions in a block of the high bytes of half-precision numbers."""


def encode(x_RD: Tensor, format: Format, name: str = "weight") -> Tensor:
    """Return the bytes (R, D / block * block_bytes) uint8 of float weights in any dtype.

    F16, BF16 and the formats of 32 weights are bit-identical with ggml's reference. Raises `QuantError` for
    rows that do not divide, weights that are not finite and weights beyond the format's range.
    """
    require_fit(x_RD.shape, format, name)
    R, D = x_RD.shape
    out_RB = torch.empty(R, D // format.block * format.block_bytes, dtype=torch.uint8, device=x_RD.device)
    for rows in _pieces(R, D):
        out_RB[rows] = _encode_piece(x_RD[rows].float(), format, name)
    return out_RB


def decode(blocks_RB: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weights (R, D) in ``dtype`` from bytes (R, B) uint8 of any GGUF type, bit-identical with ggml.

    Formats without kernels here are unpacked by the `gguf` package on the CPU. Raises `QuantError` if it
    cannot.
    """
    row_weights = blocks_RB.shape[1] // format.block_bytes * format.block
    out_RD = torch.empty(blocks_RB.shape[0], row_weights, dtype=dtype, device=blocks_RB.device)
    for rows in _pieces(blocks_RB.shape[0], row_weights):
        out_RD[rows] = _decode_piece(blocks_RB[rows], format)
    return out_RD


def all_finite(blocks_RB: Tensor, format: Format) -> bool:
    """Return whether all weights are finite. In `NATIVE` formats only half-precision scales may not be."""
    places = _SCALES.get(format.name)
    if places is None:
        pieces = _pieces(blocks_RB.shape[0], blocks_RB.shape[1])
        return all(bool(torch.isfinite(_decode_piece(blocks_RB[rows], format)).all()) for rows in pieces)
    pieces = blocks_RB.reshape(-1, format.block_bytes).split(SCANNED)
    # all exponent bits set: infinite or not a number
    return all(bool((piece_NB[:, place] & 0x7C).max() < 0x7C) for piece_NB in pieces for place in places)


def fit_grid(x_RD: Tensor, format: Format, importance_D: Tensor | None = None) -> Grid:
    """Return the grid of a packed format with the least squared error. Slower than `encode`.

    Columns are weighted by ``importance_D``. None: larger weights count a little more.
    """
    require_fit(x_RD.shape, format)
    return best_grid(x_RD.float(), format, importance_D)


def _pieces(n_rows: int, row_length: int) -> list[slice]:
    if torch.compiler.is_compiling():  # the compiler fuses everything, so temporaries do not exist
        return [slice(0, n_rows)]
    step = max(1, PIECE // max(1, row_length))
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _encode_piece(x_RD: Tensor, format: Format, name: str) -> Tensor:
    if not bool(torch.isfinite(x_RD).all()):
        raise QuantError(f"{name}: has values that are not finite; the checkpoint is damaged")
    if format.name in PLAIN:
        out = x_RD.to(torch_dtype(format.name)).contiguous()
        _require_range(out, x_RD, format, name)
        return out.view(torch.uint8)
    if format.block == 32:
        return _encode_as_reference(x_RD, format, name)
    if format in (Q4_K, Q6_K):
        _require_range(x_RD.square(), x_RD, format, name)  # the search works with squares
        grid = fit_grid(x_RD, format)
        _require_range(grid.step_RG + grid.low_RG, x_RD, format, name)
        return pack_codes(grid.codes(x_RD), grid)
    raise QuantError(f"{name}: {format.name} can be read, not written; choose {', '.join(FORMATS)}")


def _encode_as_reference(x_RD: Tensor, format: Format, name: str) -> Tensor:
    R, D = x_RD.shape
    x_RNS = x_RD.reshape(R, D // 32, 32)
    if format == Q8_0:
        d_RN1 = x_RNS.abs().amax(-1, keepdim=True) / 127
        scaled = x_RNS * _inverse(d_RN1)
        size = scaled.abs()
        whole = size.floor()
        # round halves away from zero, as C's roundf does
        rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())
        codes = (rounded + 128).to(torch.uint8)
    elif format in (Q4_0, Q5_0):
        half = 8 if format == Q4_0 else 16
        largest = x_RNS.abs().argmax(-1, keepdim=True)
        d_RN1 = x_RNS.gather(-1, largest) / -half
        codes = (x_RNS * _inverse(d_RN1) + (half + 0.5)).clamp_(0, 2 * half - 1).to(torch.uint8)
    else:
        low_RN1 = x_RNS.amin(-1, keepdim=True)
        top = 15 if format == Q4_1 else 31
        d_RN1 = (x_RNS.amax(-1, keepdim=True) - low_RN1) / top
        codes = ((x_RNS - low_RN1) * _inverse(d_RN1) + 0.5).clamp_(0, top).to(torch.uint8)
        d_RN1 = torch.cat((d_RN1, low_RN1), dim=-1)
    halves_RNH = d_RN1.half()
    _require_range(halves_RNH, x_RD, format, name)
    none = torch.empty(0)
    return pack_codes(codes.reshape(R, D), Grid(format, none, none, 0, halves_RNH.view(torch.uint8)))


def _inverse(d: Tensor) -> Tensor:
    """Return 1 / d, or 0 if d is 0 or so small that its inverse overflows (it is then stored as 0)."""
    inverse = 1 / d
    return torch.where(inverse.isfinite(), inverse, 0)


def _require_range(stored: Tensor, x: Tensor, format: Format, name: str) -> None:
    if not bool(torch.isfinite(stored).all()):
        raise QuantError(
            f"{name}: has a weight of {x.abs().max().item():.3g}, beyond the range of {format.name}"
        )


def _decode_piece(blocks_RB: Tensor, format: Format) -> Tensor:
    R = blocks_RB.shape[0]
    if format.name in PLAIN:
        return blocks_RB.contiguous().view(torch_dtype(format.name)).float()
    b_RNB = blocks_RB.reshape(R, -1, format.block_bytes)
    if format == Q8_0:
        out = b_RNB[..., 2:].view(torch.int8).float() * halves(b_RNB[..., :2])
    elif format == Q4_0:
        out = (unpack_nibbles(b_RNB[..., 2:]).float() - 8) * halves(b_RNB[..., :2])
    elif format == Q4_1:
        out = unpack_nibbles(b_RNB[..., 4:]).float() * halves(b_RNB[..., :2]) + halves(b_RNB[..., 2:4])
    elif format in (Q5_0, Q5_1):
        at = 2 if format == Q5_0 else 4
        codes = unpack_nibbles(b_RNB[..., at + 4 :]) | (unpack_fifth_bits(b_RNB[..., at : at + 4]) << 4)
        if format == Q5_0:
            out = (codes.float() - 16) * halves(b_RNB[..., :2])
        else:
            out = codes.float() * halves(b_RNB[..., :2]) + halves(b_RNB[..., 2:4])
    elif format == Q4_K:
        sc_RN8, m_RN8 = unpack_scales(b_RNB[..., 4:16])
        step = halves(b_RNB[..., :2]) * sc_RN8.float()
        low = halves(b_RNB[..., 2:4]) * m_RN8.float()
        codes = unpack_nibbles(b_RNB[..., 16:]).float().unflatten(-1, (8, 32))
        out = codes * step[..., None] - low[..., None]
    elif format == Q6_K:
        step = halves(b_RNB[..., 208:]) * b_RNB[..., 192:208].view(torch.int8).float()
        codes = (unpack_q6(b_RNB).float() - 32).unflatten(-1, (16, 16))
        out = codes * step[..., None]
    else:
        out = _decode_elsewhere(blocks_RB, format)
    return out.reshape(R, -1)


def _decode_elsewhere(blocks_RB: Tensor, format: Format) -> Tensor:
    from gguf import GGMLQuantizationType, quants  # slow to import and needed only here

    try:
        with np.errstate(all="ignore"):  # `all_finite` checks whether scales are numbers
            out = quants.dequantize(blocks_RB.cpu().numpy(), GGMLQuantizationType(format.code))
    except (NotImplementedError, ValueError) as error:
        raise QuantError(f"{format.name} blocks cannot be unpacked: {error}") from error
    return torch.from_numpy(out).to(blocks_RB.device)
