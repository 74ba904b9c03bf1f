"""A whole transformer block behind a paged cache as one native operator, for weights that lie in blocks of codes.

A step of decoding reads gigabytes of weights, so nothing else stays in the caches: each of the dozen returns to Python
that a block's operators make costs several times what it does in a loop of its own. The arithmetic is that of the
operators one by one, to the bit.

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
    """The weights of a block in the order the operator takes them.

    ``norms``: (D,) before attention and before the feed-forward. ``tiles`` and ``format_codes``: q, k, v, o, gate, up,
    down as `qmatmul.interleave` gives them. ``path``: one of `qmatmul.PATHS`.
    """

    norms: list[Tensor]
    tiles: list[Tensor]
    format_codes: list[int]
    path: str
    eps: float
    head_dim: int

    @property
    def native(self) -> bool:
        """Whether the operator takes it: on the CPU, fp32 or bf16, heads as the attention kernel has them."""
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
        """What becomes of x (N, D), as a new tensor. Keys and values go to ``pool``; cos and sin are (1, N, 1, K)."""
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
