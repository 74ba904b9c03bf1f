"""Run a model one layer at a time, reading its weights when they are needed: it may be larger than memory.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from . import rope
from .attention import causal
from .lora import LoraLinear, merged_parameter
from .model import DecoderLayer, LlamaLM


class StreamedModel:
    """A model on the meta device whose parameters ``read(name)`` returns in fp32. Adapters are in memory."""

    def __init__(self, model: LlamaLM, read: Callable[[str], Tensor]) -> None:
        self.model, self.read = model, read

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[LlamaLM]:
        """Yield the model with these parameters in memory."""
        before = []
        for name in names:
            parent, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(parent)
            module = module.base if isinstance(module, LoraLinear) else module
            before.append((module, leaf, getattr(module, leaf)))
            tied = name == "lm_head.weight" and self.model.config.tie_embeddings
            weight = self.read("model.embed_tokens.weight" if tied else name)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        try:
            yield self.model
        finally:
            for module, leaf, placeholder in before:
                setattr(module, leaf, placeholder)

    @contextmanager
    def layer(self, number: int) -> Iterator[DecoderLayer]:
        """Yield a layer with its parameters in memory."""
        prefix = f"model.layers.{number}."
        names = (name for name, _ in self.model.config.param_shapes() if name.startswith(prefix))
        with self.loaded(names) as model:
            yield cast("DecoderLayer", model.model.layers[number])

    def merged(self, name: str) -> Tensor:
        """Return a parameter of the base with an adapter's update added to it. See `merged_parameter`."""
        with self.loaded([name]):
            return merged_parameter(self.model, name)

    def run(self, layer: DecoderLayer, x_BTD: Tensor) -> Tensor:
        """Return the states after a layer, with causal attention in each row."""
        config, positions_1T = self.model.config, torch.arange(x_BTD.shape[1])[None]
        speeds = rope.inverse_frequencies(config)
        cos, sin = rope.rotation(speeds, positions_1T, x_BTD.dtype, config.rope_scaling)
        return layer(x_BTD, cos, sin, causal)

    @torch.inference_mode()
    def hidden(
        self, batches: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
    ) -> list[Tensor]:
        """Return the states (B, T, D) fp32 after the last norm of each batch of token ids (B, T).

        ``progress`` is called with the layers done and their number.
        """
        n_layers, llama = self.model.config.n_layers, self.model.model
        with self.loaded(["model.embed_tokens.weight"]):
            states = [llama.embed_tokens(ids_BT) for ids_BT in batches]
        for number in range(n_layers):
            with self.layer(number) as layer:
                states = [self.run(layer, x_BTD) for x_BTD in states]
            if progress:
                progress(number + 1, n_layers)
        with self.loaded(["model.norm.weight"]):
            return [llama.norm(x_BTD) for x_BTD in states]
