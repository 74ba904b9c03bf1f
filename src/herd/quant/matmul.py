"""Multiply by blocks: the reference in plain torch, and the choice of a kernel.

A kernel may need the blocks in another order than the file has, for example with rows interleaved. So it has
three functions: ``prepare``, called once when a layer is created, ``matmul``, and ``restore``, the inverse of
``prepare``, to save a model from memory. `choose_kernel` returns the kernel for a format and a device, or the
reference if there is none.

The native kernels round activations to int8 (see `kernels/qmatmul.py`). The reference does not. Both have
gradients with respect to the activations that ignore the rounding.

Shapes: N tokens, D inputs, R outputs, B bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import qmatmul
from .blocks import decode
from .formats import Format

TILE = 1 << 22
"""Number of weights that are unpacked at a time: 16 MiB in fp32, whatever the size of the matrix."""


@dataclass(frozen=True)
class Kernel:
    """An implementation of multiplication by blocks.

    ``restore(prepare(blocks_RB, format), format)`` returns the blocks again. ``matmul(x_ND, [prepared, ...],
    [format, ...])`` multiplies the same x by one or several matrices.
    """

    name: str
    prepare: Callable[[Tensor, Format], Tensor]
    matmul: Callable[[Tensor, list[Tensor], list[Format]], list[Tensor]]
    restore: Callable[[Tensor, Format], Tensor]


def choose_kernel(format: Format, device: torch.device) -> Kernel:
    """Return the fastest kernel for ``format`` on ``device``. ``HERD_ISA`` can select a slower one."""
    path = qmatmul.path() if device.type == "cpu" else None
    return REFERENCE if path is None or format.code not in qmatmul.format_codes() else NATIVE[path]


def reference_matmul(x_ND: Tensor, matrices: list[Tensor], formats: list[Format]) -> list[Tensor]:
    """Return x times the transposed weights, (N, R) in x's dtype, unpacking one tile of rows at a time.

    Under autocast the products are computed in its dtype.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        x_ND = x_ND.to(torch.get_autocast_dtype(device))
    return [_Unpacked.apply(x_ND, *each) for each in zip(matrices, formats, strict=True)]


class _Unpacked(torch.autograd.Function):
    """A product with an unpacked copy of the weights, which backward unpacks again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, blocks_RB: Tensor, format: Format) -> Tensor:
        ctx.blocks_RB, ctx.format = blocks_RB, format
        outs = [F.linear(x_ND, decode(tile_RB, format, x_ND.dtype)) for tile_RB in _tiles(blocks_RB, format)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NR: Tensor) -> tuple[Tensor, None, None]:
        return _times_weight(dy_NR, ctx.blocks_RB, ctx.format), None, None


def _times_weight(dy_NR: Tensor, blocks_RB: Tensor, format: Format) -> Tensor:
    """Return the gradient of the activations, dy times the weights (R, D).

    A tile is some columns of all rows: each sum over rows is one product, and nothing is rounded twice.
    """
    n_rows, n_blocks = len(blocks_RB), blocks_RB.shape[1] // format.block_bytes
    at_once = max(1, TILE // (n_rows * format.block))
    if at_once >= n_blocks:
        return dy_NR @ decode(blocks_RB, format, dy_NR.dtype)
    dx_ND = dy_NR.new_empty(len(dy_NR), n_blocks * format.block)
    for start in range(0, n_blocks, at_once):
        stop = min(start + at_once, n_blocks)
        tile_RB = blocks_RB[:, start * format.block_bytes : stop * format.block_bytes].contiguous()
        columns = slice(start * format.block, stop * format.block)
        dx_ND[:, columns] = dy_NR @ decode(tile_RB, format, dy_NR.dtype)
    return dx_ND


def _tiles(blocks_RB: Tensor, format: Format) -> tuple[Tensor, ...]:
    return blocks_RB.split(max(1, TILE // (blocks_RB.shape[1] // format.block_bytes * format.block)))


def _unchanged(blocks: Tensor, format: Format) -> Tensor:
    return blocks


REFERENCE = Kernel("reference", _unchanged, reference_matmul, _unchanged)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, prepared: Tensor, format: Format, path: str) -> Tensor:
        ctx.prepared, ctx.format = prepared, format
        return qmatmul.qmatmul(x_ND, prepared, format.code, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NR: Tensor) -> tuple[Tensor, None, None, None]:
        return _times_weight(dy_NR, _restore(ctx.prepared, ctx.format), ctx.format), None, None, None


def _native(path: str) -> Kernel:
    def matmul(x_ND: Tensor, matrices: list[Tensor], formats: list[Format]) -> list[Tensor]:
        if x_ND.requires_grad and torch.is_grad_enabled():
            return [_Native.apply(x_ND, *each, path) for each in zip(matrices, formats, strict=True)]
        return qmatmul.qmatmul_each(x_ND, matrices, [format.code for format in formats], path)

    return Kernel(path, _prepare, matmul, _restore)


def _prepare(blocks_RB: Tensor, format: Format) -> Tensor:
    return qmatmul.interleave(blocks_RB, format.code)


def _restore(prepared: Tensor, format: Format) -> Tensor:
    return qmatmul.deinterleave(prepared, format.code)


NATIVE = {path: _native(path) for path in qmatmul.PATHS}
"""The native kernels by the CPU instructions they use."""
