"""A model behind a paged cache: what the engine, its draft and the scorer all feed their tokens to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..llama import rope
from ..llama.model import LlamaLM
from ..quant.linear import native_blocks
from .cache import Cached, PagedCache


class Trunk:
    """Gives hidden states and keeps keys and values. Quantized models on the CPU run block by block in one native
    operator each, with the results of the model's own forward; all others run that forward."""

    def __init__(self, model: LlamaLM, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self._blocks = native_blocks(model)

    def __call__(self, parts: Sequence[tuple[Cached, int]], tokens: Sequence[int]) -> Tensor:
        """Hidden states (N, D) after the last norm of these tokens, the next n of each (sequence, n) in this order.

        The pages must be there; the sequences hold the tokens from now on.
        """
        positions_1N, attend = self.cache.step(parts)
        tokens_1N = torch.tensor([tokens], device=self.model.device)
        if self._blocks is None or torch.is_grad_enabled():
            return self.model(tokens_1N, positions_1N, attend)[0]
        trunk = self.model.model
        x_ND = trunk.embed_tokens(tokens_1N)[0]
        cos, sin = rope.rotation(trunk.inv_freq, positions_1N, x_ND.dtype)
        for layer, block in enumerate(self._blocks):
            x_ND = block(x_ND, cos, sin, attend.pool, attend.ragged, layer)
        return trunk.norm(x_ND)
