"""Activations times quantized weights: int8 activations meet the codes of GGUF's blocks in integers.

A weight of four bits is read once and multiplied as it is, so decoding runs at the speed of memory and reading in a
prompt at that of the int8 units. What it costs: activations are rounded to int8 too, each 32 of a token with
a scale of their own (`round_activations` says exactly what the kernel computes with).

The weights' bytes are put in another order first (`interleave`, undone by `deinterleave`): sixteen rows side by side.
`native/qmatmul.h` draws it. A token's result is the same to the bit whatever other tokens are in the batch and however
many threads compute.

Three paths are in the library, and the fastest the processor has is taken: AVX-512 VNNI, AVX2, portable C++.
``HERD_ISA=vnni|avx2|portable`` asks for one of them, and ``HERD_ISA=reference`` for plain torch, whose activations are
not rounded.

Shapes: N tokens, D inputs, R outputs, B bytes of a packed row, W 32-bit words of a block.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import QuantError
from . import build
from .large_pages import chunks

PATHS = ("vnni", "avx2", "portable")
"""Fastest first; the library knows them by their place."""
_ROWS, _GROUP = 16, 32


@dataclass(frozen=True)
class TileLayout:
    """Where a block of one format keeps its half-precision scale (None: among the words), and how long it is."""

    block_bytes: int
    half_at: int | None


LAYOUTS = {2: TileLayout(18, 0), 8: TileLayout(34, 0), 12: TileLayout(144, None), 14: TileLayout(210, 208)}
"""By GGUF's number of the format: Q4_0, Q8_0, Q4_K, Q6_K."""


def path() -> str | None:
    """The path that will be taken, or None for plain torch: asked for, or because there is no native library.

    Says once if it is not the fastest there is.
    Raises `QuantError` when ``HERD_ISA`` names one that is unknown or that this processor lacks.
    """
    wanted = os.environ.get("HERD_ISA")
    if wanted == "reference":
        return None
    if wanted and wanted not in PATHS:
        raise QuantError(f"HERD_ISA={wanted}: choose {', '.join((*PATHS, 'reference'))}")
    paths = here()
    if not paths:
        return None
    if wanted and wanted not in paths:
        raise QuantError(f"HERD_ISA={wanted}: this processor lacks it; choose {', '.join(paths)}")
    if not wanted and paths[0] != PATHS[0]:
        _say_slower(paths[0])
    return wanted or paths[0]


@functools.cache
def here() -> tuple[str, ...]:
    """The paths that this processor has, fastest first; none where there is no native library."""
    if not build.ready():
        return ()
    torch.library.register_fake(
        "herd_native::qmatmul",
        lambda x, tiles, *_: [x.new_empty(x.shape[0], each.shape[0]) for each in tiles],
    )
    for name in ("qmatmul_interleave", "qmatmul_deinterleave"):
        torch.library.register_fake(f"herd_native::{name}", lambda *_: None)
    return tuple(PATHS[number] for number in torch.ops.herd_native.qmatmul_paths())


@functools.cache
def _say_slower(name: str) -> None:
    warnings.warn(f"no AVX-512 VNNI here: quantized matmuls take the {name} path (slower)", stacklevel=4)


def qmatmul(x_ND: Tensor, tiles_RB: Tensor, format_code: int, path: str) -> Tensor:
    """x times the weights transposed, (N, R) in x's dtype. ``tiles_RB`` come from `interleave`."""
    return qmatmul_each(x_ND, [tiles_RB], [format_code], path)[0]


def qmatmul_each(x_ND: Tensor, tiles: list[Tensor], format_codes: list[int], path: str) -> list[Tensor]:
    """`qmatmul` of the same x by several matrices, which is one piece of work: x is rounded once, and no thread waits
    for the others between them. fp32 and bf16 are taken as they are, other types by way of fp32."""
    if x_ND.dtype not in (torch.float32, torch.bfloat16):
        return [y_NR.to(x_ND.dtype) for y_NR in qmatmul_each(x_ND.float(), tiles, format_codes, path)]
    return torch.ops.herd_native.qmatmul(x_ND.contiguous(), tiles, format_codes, PATHS.index(path))


def interleave(blocks_RB: Tensor, format_code: int) -> Tensor:
    """Blocks as a file has them, in the order the kernel reads: other memory of the same shape, in large pages."""
    tiles_RB = chunks.piece(blocks_RB.nbytes).view(blocks_RB.shape)
    torch.ops.herd_native.qmatmul_interleave(blocks_RB.contiguous(), format_code, tiles_RB)
    return tiles_RB


def deinterleave(tiles_RB: Tensor, format_code: int) -> Tensor:
    """Inverse of `interleave`."""
    blocks_RB = torch.empty_like(tiles_RB)
    torch.ops.herd_native.qmatmul_deinterleave(tiles_RB, format_code, blocks_RB)
    return blocks_RB


def plain_interleave(blocks_RB: Tensor, format_code: int) -> Tensor:
    """`interleave` in plain torch."""
    layout = LAYOUTS[format_code]
    whole = blocks_RB.shape[0] // _ROWS * _ROWS
    b_TrNB = blocks_RB[:whole].reshape(
        -1, _ROWS, blocks_RB.shape[1] // layout.block_bytes, layout.block_bytes
    )
    start = 2 if layout.half_at == 0 else 0
    words = b_TrNB[..., start : start + layout.block_bytes // 4 * 4].unflatten(-1, (-1, 4))
    planes = [words.permute(0, 2, 3, 1, 4).flatten(2)]
    if layout.half_at is not None:
        planes.append(b_TrNB[..., layout.half_at : layout.half_at + 2].permute(0, 2, 1, 3).flatten(2))
    return torch.cat((torch.cat(planes, dim=2).view(whole, blocks_RB.shape[1]), blocks_RB[whole:]))


def round_activations(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (N, D) and fp32 scales (N, D / 32), as the kernel makes them: the largest of each 32 becomes 127."""
    groups = x_ND.float().unflatten(-1, (-1, _GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # 127 / top would be torch's reciprocal, times 127
    scale = torch.where(inverse.isinf(), 0, top / 127.0)
    codes = (groups * torch.where(inverse.isinf(), 0, inverse)).round().nan_to_num()
    scale = torch.where(top.isfinite(), scale, torch.nan)
    return codes.to(torch.int8).flatten(-2), scale.squeeze(-1)
