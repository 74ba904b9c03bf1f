"""A whole decoder layer with a paged cache as one native operator, for quantized weights.

A decode step reads gigabytes of weights and so evicts everything else from the processor's caches. Each of
the dozen returns to Python between a layer's operators then takes several times as long as in a small loop.
The results have the same bits as with separate operators.

Shapes: N new tokens of all sequences in one row, D model dim, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .page_layout import LANES
from .paged_attention import WIDEST, Ragged
from .pointwise import NATIVE_DTYPES
from .qmatmul import PATHS


@dataclass(frozen=True)
class FusedLayer:
    """The weights of a decoder layer in the order in which the operator takes them.

    ``norms`` are the two (D,) before attention and before the feed-forward. ``tiles`` and ``format_codes``
    are those of q, k, v, o, gate, up and down, as `qmatmul.interleave` returns them. ``path`` is one of
    `qmatmul.PATHS`.
    """

    norms: list[Tensor]
    tiles: list[Tensor]
    format_codes: list[int]
    path: str
    eps: float
    head_dim: int

    @property
    def native(self) -> bool:
        """Whether the operator supports this layer: on the CPU, fp32 or bf16 norms, and its head dim."""
        types = {norm.dtype for norm in self.norms}
        return (
            all(tensor.is_cpu for tensor in (*self.norms, *self.tiles))
            and len(types) == 1
            and types.issubset(NATIVE_DTYPES)
            and self.head_dim % LANES == 0
            and self.head_dim <= WIDEST
        )

    def __call__(
        self, x_ND: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, ragged: Ragged, layer: int
    ) -> Tensor:
        """Return the layer's output for x (N, D), and write keys and values to ``pool``.

        cos and sin are (1, N, 1, K).
        """
        return torch.ops.herd_native.block(
            x_ND,
            self.norms,
            self.tiles,
            self.format_codes,
            PATHS.index(self.path),
            self.eps,
            cos,
            sin,
            pool,
            ragged.tables,
            ragged.rows,
            layer,
        )
