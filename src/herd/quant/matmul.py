"""Multiplying by blocks: the plain reference, and the place where a kernel slots in.

A kernel may want the blocks in another order (rows interleaved, say) than the file has them. So it has three functions:
``prepare`` once, when a layer is made; ``matmul`` ever after; and ``restore``, so that a model that runs can be saved
without loss. `choose` picks the kernel for a format and a device; the reference serves where no other does.

Shapes: N tokens, D inputs, R outputs, B bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import decode
from .formats import Format

TILE = 1 << 22
"""Weights unpacked at a time: 16 MiB in fp32, whatever the size of the matrix."""


@dataclass(frozen=True)
class Kernel:
    """How to multiply by one format's blocks. ``prepare(blocks_RB, format)`` gives what ``matmul(x_ND, prepared,
    format)`` takes and ``restore(prepared, format)`` turns back into ``blocks_RB``."""

    name: str
    prepare: Callable[[Tensor, Format], Tensor]
    matmul: Callable[[Tensor, Tensor, Format], Tensor]
    restore: Callable[[Tensor, Format], Tensor]


def choose(format: Format, device: torch.device) -> Kernel:
    """The fastest kernel for ``format`` on ``device``."""
    return REFERENCE


def reference_matmul(x_ND: Tensor, blocks_RB: Tensor, format: Format) -> Tensor:
    """x times the unpacked weights transposed, (N, R) in x's dtype; unpacks one tile of rows at a time."""
    row_weights = blocks_RB.shape[1] // format.block_bytes * format.block
    tiles = blocks_RB.split(max(1, TILE // row_weights))
    outs = [F.linear(x_ND, decode(tile_RB, format, x_ND.dtype)) for tile_RB in tiles]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _as_it_is(blocks: Tensor, format: Format) -> Tensor:
    return blocks


REFERENCE = Kernel("reference", _as_it_is, reference_matmul, _as_it_is)
