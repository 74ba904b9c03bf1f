"""Convert weights to GGUF's blocks and back, exactly as ggml does.

The formats themselves are in `legacy.py`, `k_quants.py` and `iq4.py`. This module converts whole matrices,
in pieces that fit into the CPU's cache, and finds values that a format cannot represent. Formats without an
entry in `CODECS` are only unpacked, by the `gguf` package.

Shapes: R rows, D weights per row, N = D / block blocks, B bytes of a packed row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..dtypes import torch_dtype
from ..errors import QuantError
from .codec import Codec, Grid
from .formats import FORMATS, PLAIN, Format, require_fit
from .iq4 import IQ4
from .k_quants import K_QUANTS
from .legacy import LEGACY

__all__ = ["CODECS", "all_finite", "decode", "encode", "fit_grid", "pieces"]

CODECS: dict[str, Codec] = {codec.name: codec for codec in (*LEGACY, *K_QUANTS, *IQ4)}
"""The packed formats that can be written, by name."""
PIECE = 1 << 18
"""Number of weights that are encoded or decoded at a time."""
BEYOND = 1e9
"""No packed format has a weight of this size, and the search for a grid needs finite squares."""
SCANNED = 1 << 20
"""Number of blocks whose scales are checked at a time: enough for all threads."""


def encode(x_RD: Tensor, format: Format, name: str = "weight", importance_D: Tensor | None = None) -> Tensor:
    """Return the bytes (R, D / block * block_bytes) uint8 of float weights in any dtype.

    Errors of columns are weighted by ``importance_D`` (the mean square of the matrix's inputs). Without it,
    F16, BF16 and the formats of 32 weights with even steps are bit-identical with ggml's reference. Raises
    `QuantError` for rows with an incomplete block, weights that are not finite and weights beyond the
    format's range.
    """
    require_fit(x_RD.shape, format, name)
    R, D = x_RD.shape
    out_RB = torch.empty(R, D // format.block * format.block_bytes, dtype=torch.uint8, device=x_RD.device)
    for rows in pieces(R, D):
        out_RB[rows] = _encode_piece(x_RD[rows].float(), format, name, importance_D)
    return out_RB


def decode(blocks_RB: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weights (R, D) in ``dtype`` from bytes (R, B) uint8 of any GGUF type, bit-identical with ggml.

    Formats without a codec are unpacked by the `gguf` package on the CPU. Raises `QuantError` if it cannot.
    """
    row_weights = blocks_RB.shape[1] // format.block_bytes * format.block
    out_RD = torch.empty(blocks_RB.shape[0], row_weights, dtype=dtype, device=blocks_RB.device)
    for rows in pieces(blocks_RB.shape[0], row_weights):
        out_RD[rows] = _decode_piece(blocks_RB[rows], format)
    return out_RD


def all_finite(blocks_RB: Tensor, format: Format) -> bool:
    """Return whether all weights are finite. Of a packed format only half-precision scales may not be."""
    if format.name in CODECS:
        places = list(CODECS[format.name].half_positions())
    elif format.name == "F16":
        places = [0]
    else:
        parts = pieces(blocks_RB.shape[0], blocks_RB.shape[1])
        return all(bool(torch.isfinite(_decode_piece(blocks_RB[rows], format)).all()) for rows in parts)
    split = blocks_RB.reshape(-1, format.block_bytes).split(SCANNED)
    # all exponent bits in the high byte set: infinite or not a number
    return all(bool((piece_NB[:, place + 1] & 0x7C).max() < 0x7C) for piece_NB in split for place in places)


def fit_grid(x_RD: Tensor, format: Format, importance_D: Tensor | None = None) -> Grid:
    """Return the grid of a packed format with the least squared error. Slower than `encode`.

    Columns are weighted by ``importance_D``. Without it, larger weights count a little more.
    """
    require_fit(x_RD.shape, format)
    codec = CODECS[format.name]
    grids = [codec.fit(x_RD[rows].float(), importance_D) for rows in pieces(*x_RD.shape)]
    header = {field: torch.cat([grid.header[field] for grid in grids]) for field in grids[0].header}
    return Grid(
        codec, torch.cat([grid.step_RG for grid in grids]), torch.cat([grid.low_RG for grid in grids]), header
    )


def pieces(n_rows: int, row_length: int) -> list[slice]:
    """Return slices of the rows of a matrix, of about `PIECE` weights each."""
    if torch.compiler.is_compiling():  # the compiler fuses everything, so temporaries do not exist
        return [slice(0, n_rows)]
    step = max(1, PIECE // max(1, row_length))
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _encode_piece(x_RD: Tensor, format: Format, name: str, importance_D: Tensor | None) -> Tensor:
    if not bool(torch.isfinite(x_RD).all()):
        raise QuantError(f"{name}: has values that are not finite; the checkpoint is damaged")
    if format.name in PLAIN:
        out = x_RD.to(torch_dtype(format.name)).contiguous()
        _require_range(bool(torch.isfinite(out).all()), x_RD, format, name)
        return out.view(torch.uint8)
    if format.name not in CODECS:
        raise QuantError(f"{name}: {format.name} can be read, not written; choose {', '.join(FORMATS)}")
    _require_range(bool((x_RD.abs() < BEYOND).all()), x_RD, format, name)
    out = CODECS[format.name].encode(x_RD, importance_D)
    _require_range(all_finite(out, format), x_RD, format, name)
    return out


def _require_range(within: bool, x: Tensor, format: Format, name: str) -> None:
    if not within:
        raise QuantError(
            f"{name}: has a weight of {x.abs().max().item():.3g}, beyond the range of {format.name}"
        )


def _decode_piece(blocks_RB: Tensor, format: Format) -> Tensor:
    if format.name in PLAIN:
        return blocks_RB.contiguous().view(torch_dtype(format.name)).float()
    if format.name in CODECS:
        return CODECS[format.name].decode(blocks_RB)
    return _decode_elsewhere(blocks_RB, format).reshape(blocks_RB.shape[0], -1)


def _decode_elsewhere(blocks_RB: Tensor, format: Format) -> Tensor:
    from gguf import GGMLQuantizationType, quants  # slow to import and needed only here

    try:
        with np.errstate(all="ignore"):  # `all_finite` checks whether scales are numbers
            out = quants.dequantize(blocks_RB.cpu().numpy(), GGMLQuantizationType(format.code))
    except (NotImplementedError, ValueError) as error:
        raise QuantError(f"{format.name} blocks cannot be unpacked: {error}") from error
    return torch.from_numpy(out).to(blocks_RB.device)
