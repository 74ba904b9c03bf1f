"""Multiply activations by quantized weights in integers: int8 activations by the codes of GGUF's blocks.

A 4-bit weight is read once and multiplied without unpacking, so decoding runs at the speed of memory, and
prompts at the speed of the int8 units. The price is that activations are rounded to int8 too, with a scale
for each 32 of a token (`round_activations` does exactly what the kernel does).

The weights' bytes are reordered first (`interleave`, undone by `deinterleave`): sixteen rows side by side, as
drawn in `native/qmatmul.h`. A token's result is the same to the bit whatever other tokens are in the batch
and however many threads compute.

There are five paths, and the fastest that the processor supports is taken: AVX-512 VNNI, AVX-512, AVX-VNNI,
AVX2, portable C++. ``HERD_ISA=vnni|avx512|avxvnni|avx2|portable`` asks for one of them, and
``HERD_ISA=reference`` for plain torch, which does not round activations.

Shapes: N tokens, D inputs, R outputs, B bytes of a packed row, W 32-bit words of a block.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from ..errors import QuantError
from . import build
from .large_pages import chunks

PATHS = ("vnni", "avx512", "avxvnni", "avx2", "portable")
"""Instruction sets, fastest first. The native library identifies them by their index."""
_GROUP = 32


def path() -> str | None:
    """Return the path to use, or None for plain torch (by the user's choice, or without a native library).

    Warns once if it is not the fastest of all paths.
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
    """Return the paths that this processor supports, fastest first, or none without the native library."""
    if not build.ready():
        return ()
    torch.library.register_fake(
        "herd_native::qmatmul",
        lambda x, tiles, *_: [x.new_empty(x.shape[0], each.shape[0]) for each in tiles],
    )
    torch.library.register_fake(
        "herd_native::qmatmul_twice",
        lambda x, tiles, *_: x.new_empty(x.shape[0], tiles.shape[0], dtype=torch.float32),
    )
    for name in ("qmatmul_interleave", "qmatmul_deinterleave"):
        torch.library.register_fake(f"herd_native::{name}", lambda *_: None)
    return tuple(PATHS[number] for number in torch.ops.herd_native.qmatmul_paths())


@functools.cache
def format_codes() -> frozenset[int]:
    """Return GGUF's numbers of the formats that the native kernels multiply by, if there are kernels."""
    return frozenset(torch.ops.herd_native.qmatmul_formats() if here() else ())


@functools.cache
def _say_slower(name: str) -> None:
    warnings.warn(
        f"this processor has no AVX-512 VNNI: quantized matmuls take the slower {name} path", stacklevel=4
    )


def qmatmul(x_ND: Tensor, tiles_RB: Tensor, format_code: int, path: str) -> Tensor:
    """Return x times the transposed weights, (N, R) in x's dtype. ``tiles_RB`` come from `interleave`."""
    return qmatmul_each(x_ND, [tiles_RB], [format_code], path)[0]


def qmatmul_each(x_ND: Tensor, tiles: list[Tensor], format_codes: list[int], path: str) -> list[Tensor]:
    """Multiply the same x by several matrices, so that x is rounded once and threads wait once.

    fp32 and bf16 are taken as they are, other dtypes are converted to fp32 and back.
    """
    if x_ND.dtype not in (torch.float32, torch.bfloat16):
        return [y_NR.to(x_ND.dtype) for y_NR in qmatmul_each(x_ND.float(), tiles, format_codes, path)]
    return torch.ops.herd_native.qmatmul(x_ND.contiguous(), tiles, format_codes, PATHS.index(path))


def qmatmul_twice(x_ND: Tensor, tiles_RB: Tensor, format_code: int, path: str) -> Tensor:
    """Return x times the transposed weights, (N, R) fp32, with activations rounded in two steps.

    The first step rounds them to int8, the second one the errors of the first. The weights are read once.
    """
    if x_ND.dtype not in (torch.float32, torch.bfloat16):
        x_ND = x_ND.float()
    return torch.ops.herd_native.qmatmul_twice(x_ND.contiguous(), tiles_RB, format_code, PATHS.index(path))


def interleave(blocks_RB: Tensor, format_code: int) -> Tensor:
    """Return a file's blocks in the order that the kernel reads.

    The result has the same shape and its own memory, in large pages.
    """
    tiles_RB = chunks.piece(blocks_RB.nbytes).view(blocks_RB.shape)
    torch.ops.herd_native.qmatmul_interleave(blocks_RB.contiguous(), format_code, tiles_RB)
    return tiles_RB


def deinterleave(tiles_RB: Tensor, format_code: int) -> Tensor:
    """Return the blocks in their original order: the inverse of `interleave`."""
    blocks_RB = torch.empty_like(tiles_RB)
    torch.ops.herd_native.qmatmul_deinterleave(tiles_RB, format_code, blocks_RB)
    return blocks_RB


def round_activations(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (N, D) and fp32 scales (N, D / 32) as the kernel makes them.

    The largest of each 32 becomes 127.
    """
    groups = x_ND.float().unflatten(-1, (-1, _GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # 127 / top would be torch's reciprocal, times 127
    scale = torch.where(inverse.isinf(), 0, top / 127.0)
    codes = (groups * torch.where(inverse.isinf(), 0, inverse)).round().nan_to_num()
    scale = torch.where(top.isfinite(), scale, torch.nan)
    return codes.to(torch.int8).flatten(-2), scale.squeeze(-1)
