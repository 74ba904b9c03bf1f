"""Several low-rank adapters on one base: each token of a batch uses its own adapter, or none.

The base is computed once for all tokens. Then each adapter that some token uses adds its update to those
tokens only. So requests for different adapters share one batch, one cache and one copy of the base (S-LoRA,
arXiv 2311.03285).

Shapes: N tokens of a step, R rank, D inputs, O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .model import LlamaLM, project

LayerUpdate = tuple[Tensor, Tensor, float]
"""A (R, D), B (O, R) and the scale of an adapter on one layer."""


class AdapterSwitch:
    """The names of the adapters, and which of them each token of the current step uses."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self.digests = dict(digests)
        """A hash of the weights of each adapter, by name."""
        self.tokens: dict[str, Tensor] = {}
        """The indices of the tokens of each adapter in use. Empty: all tokens use the base alone."""

    def use(self, names: Sequence[str], counts: Sequence[int]) -> None:
        """Choose the adapter of every sequence of a step ("": none), given each one's number of tokens."""
        self.tokens = {}
        if not any(names):
            return
        starts = [0, *accumulate(counts)]
        for name in dict.fromkeys(filter(None, names)):
            spans = [
                range(a, b) for other, a, b in zip(names, starts, starts[1:], strict=False) if other == name
            ]
            self.tokens[name] = torch.tensor([token for span in spans for token in span])


class SwitchedLinear(nn.Module):
    """A frozen linear layer with an update for the tokens of each adapter."""

    def __init__(self, base: nn.Module, updates: Mapping[str, LayerUpdate], switch: AdapterSwitch) -> None:
        super().__init__()
        self.base, self.updates, self.switch = base, dict(updates), switch

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, (self,))[0]

    def together(self, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """Apply ``layers`` (this is the first) to ``x``. The frozen layers run in one call if they can."""
        bases = [layer.base if isinstance(layer, SwitchedLinear) else layer for layer in layers]
        outs = project(x, *bases)
        for layer, y in zip(layers, outs, strict=True):
            if isinstance(layer, SwitchedLinear):
                layer._update(x, y)
        return outs

    def _update(self, x: Tensor, y: Tensor) -> None:
        """Add each adapter's update to its tokens of ``y``, in place."""
        x_ND, y_NO = x.flatten(0, -2), y.flatten(0, -2)
        for name, tokens in self.switch.tokens.items():
            if name in self.updates:
                a_RD, b_OR, scale = self.updates[name]
                delta = scale * F.linear(F.linear(x_ND[tokens].to(a_RD.dtype), a_RD), b_OR)
                y_NO.index_add_(0, tokens, delta.to(y_NO.dtype))


def switch_adapters(model: LlamaLM, adapters: Mapping[str, Mapping[str, LayerUpdate]]) -> AdapterSwitch:
    """Put several adapters on a model in place. Each is given by its name and its updates by layer.

    Raises `ConfigError` for a layer that the model does not have, or one of another size.
    """
    switch = AdapterSwitch({name: _digest(updates) for name, updates in adapters.items()})
    layers = dict.fromkeys(layer for updates in adapters.values() for layer in updates)
    for layer_name in layers:
        base = dict(model.named_modules()).get(layer_name)
        if base is None or not hasattr(base, "out_features"):
            raise ConfigError(f"an adapter changes {layer_name}, which the model does not have")
        own = {name: updates[layer_name] for name, updates in adapters.items() if layer_name in updates}
        for name, (a_RD, b_OR, _) in own.items():
            if (len(b_OR), a_RD.shape[1]) != (base.out_features, base.in_features):
                raise ConfigError(
                    f"adapter {name!r} is for a {layer_name} of another size: it has another base model"
                )
        parent, _, leaf = layer_name.rpartition(".")
        device = model.device
        moved = {n: (a.float().to(device), b.float().to(device), s) for n, (a, b, s) in own.items()}
        setattr(model.get_submodule(parent), leaf, SwitchedLinear(cast("nn.Module", base), moved, switch))
    return switch


def adapter_switch(model: nn.Module) -> AdapterSwitch | None:
    """Return the switch of a model's adapters, or None if it does not have several."""
    return next((layer.switch for layer in model.modules() if isinstance(layer, SwitchedLinear)), None)


def _digest(updates: Mapping[str, LayerUpdate]) -> str:
    digest = hashlib.sha256()
    for name, (a_RD, b_OR, scale) in updates.items():
        digest.update(f"{name} {scale}".encode())
        for part in (a_RD, b_OR):
            digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
