"""Run a model over a paged cache, for the engine, its draft model and the scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..llama import rope
from ..llama.model import LlamaLM
from ..llama.switched import adapter_switch
from ..quant.linear import fused_layers
from .cache import Cached, PagedCache


class ModelRunner:
    """A model with its cache.

    A quantized model on a CPU runs all layers as one native operator, with the same results as the model's
    own forward. Any other model runs its own forward, and so does every step that uses an adapter.
    """

    def __init__(self, model: LlamaLM, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self._layers = fused_layers(model)
        self.switch = adapter_switch(model)
        """The adapters on the model, if it has several (`llama.switched`)."""

    def __call__(
        self,
        parts: Sequence[tuple[Cached, int]],
        tokens: Sequence[int],
        adapters: Sequence[str] = (),
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> Tensor:
        """Feed the next n tokens of each (sequence, n), in order, and return final hidden states (N, D).

        The pages must have been taken before (`PagedCache.grow`). Afterwards these tokens are in the cache.
        ``adapters`` are the names of the adapters of the sequences ("" for the base alone). ``on_layer`` is
        called between the layers, with the number of those that are computed.
        """
        positions_1N, attend = self.cache.step(parts)
        if self.switch is not None:
            self.switch.use(adapters or [""] * len(parts), [n for _, n in parts])
        tokens_1N = torch.tensor([tokens], device=self.model.device)
        adapted = self.switch is not None and self.switch.active

        def told(layer: int, *heads: Tensor) -> Tensor:
            on_layer(layer)
            return attend(layer, *heads)

        if self._layers is None or adapted or torch.is_grad_enabled():
            return self.model(tokens_1N, positions_1N, told)[0]
        trunk = self.model.model
        x_ND = trunk.embed_tokens(tokens_1N)[0]
        cos, sin = rope.rotation(trunk.inv_freq, positions_1N, x_ND.dtype, trunk.config.rope_scaling)
        return trunk.norm(self._layers(x_ND, cos, sin, attend.pool, attend.ragged, on_layer))
