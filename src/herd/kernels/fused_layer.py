"""Decoder layers with a paged cache as one native operator, for quantized weights.

A decode step reads gigabytes of weights and so evicts everything else from the processor's caches. Each of
the dozen returns to Python between a layer's operators then takes several times as long as in a small loop.
The results have the same bits as with separate operators.

Shapes: N new tokens of all sequences in one row, D model dim, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .page_layout import LANES
from .paged_attention import WIDEST, Ragged
from .pointwise import NATIVE_DTYPES
from .qmatmul import PATHS

AT_ONCE = 32
"""Up to this many tokens, all layers are one call. More take seconds, and Ctrl-C must work between layers."""
NORMS, MATRICES = 2, 7
"""Norms and matrices of a layer."""


@dataclass(frozen=True)
class FusedLayers:
    """The weights of all decoder layers in the order in which the operator takes them.

    ``norms`` are the two (D,) of each layer, before attention and before the feed-forward. ``tiles`` and
    ``format_codes`` are those of its q, k, v, o, gate, up and down, as `qmatmul.interleave` returns them.
    ``path`` is one of `qmatmul.PATHS`.
    """

    norms: list[Tensor]
    tiles: list[Tensor]
    format_codes: list[int]
    path: str
    eps: float
    head_dim: int

    @property
    def native(self) -> bool:
        """Whether the operator supports these layers: on the CPU, fp32 or bf16 norms, and their head dim."""
        types = {norm.dtype for norm in self.norms}
        return (
            all(tensor.is_cpu for tensor in (*self.norms, *self.tiles))
            and len(types) == 1
            and types.issubset(NATIVE_DTYPES)
            and self.head_dim % LANES == 0
            and self.head_dim <= WIDEST
        )

    def __call__(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        pool: Tensor,
        ragged: Ragged,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> Tensor:
        """Return the last layer's output for x (N, D), and write keys and values to ``pool``.

        cos and sin are (1, N, 1, K). ``on_layer`` is told, before each call, which layer it begins with.
        """
        path = PATHS.index(self.path)
        for first, norms, tiles, codes in self._whole if len(x_ND) <= AT_ONCE else self._single:
            on_layer(first)
            x_ND = torch.ops.herd_native.blocks(
                x_ND, norms, tiles, codes, path, self.eps, cos, sin, pool, ragged.tables, ragged.rows, first
            )
        return x_ND

    @cached_property
    def _whole(self) -> Sequence[tuple[int, list[Tensor], list[Tensor], list[int]]]:
        return [(0, self.norms, self.tiles, self.format_codes)]

    @cached_property
    def _single(self) -> Sequence[tuple[int, list[Tensor], list[Tensor], list[int]]]:
        """The index and the weights of each layer."""
        return [
            (
                layer,
                self.norms[NORMS * layer : NORMS * (layer + 1)],
                self.tiles[MATRICES * layer : MATRICES * (layer + 1)],
                self.format_codes[MATRICES * layer : MATRICES * (layer + 1)],
            )
            for layer in range(len(self.norms) // NORMS)
        ]
