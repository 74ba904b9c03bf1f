"""Several low-rank adapters on one base: each token of a batch uses its own adapter, or none.

The base is computed once for all tokens. The adapters of a layer are stacked: the tokens are multiplied by
the rows of all adapters that some token of the step uses, and a mask keeps for each token the products of its
own adapter. So requests for different adapters share one batch, one cache and one copy of the base (S-LoRA,
arXiv 2311.03285), and a layer needs three small operators however many adapters there are.

Shapes: N tokens of a step, R rank, S sum of the ranks of all adapters, D inputs, O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .model import LlamaLM, project

LayerUpdate = tuple[Tensor, Tensor, float]
"""A (R, D), B (O, R) and the scale of an adapter on one layer."""
Layout = tuple[tuple[int, float], ...]
"""The rank and the scale of each adapter on one layer, in the order of the switch. Rank 0: not adapted."""


class AdapterSwitch:
    """The names of the adapters, and which of them each token of the current step uses."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self.digests = dict(digests)
        """A hash of the weights of each adapter, by name."""
        self._numbers = {name: number for number, name in enumerate(digests)}
        self._used: list[int] = []  # numbers of the adapters that this step uses, sorted
        self._adapter_N = torch.empty(0, dtype=torch.long)
        self._masks: dict[Layout, tuple[slice, Tensor]] = {}

    @property
    def active(self) -> bool:
        """Whether some token of this step uses an adapter."""
        return bool(self._used)

    def use(self, names: Sequence[str], counts: Sequence[int]) -> None:
        """Choose the adapter of every sequence of a step ("": none), given each one's number of tokens."""
        self._masks = {}
        self._used = sorted({self._numbers[name] for name in names if name})
        if self._used:
            numbers = torch.tensor([self._numbers.get(name, -1) for name in names])
            self._adapter_N = numbers.repeat_interleave(torch.tensor(counts))

    def mask(self, layout: Layout, device: torch.device) -> tuple[slice, Tensor]:
        """Return the rows of the stack from the first to the last adapter in use, and their mask (N, rows).

        The mask is the adapter's scale where a row belongs to the token's adapter, and otherwise 0.
        """
        if layout not in self._masks:
            first, last = self._used[0], self._used[-1]
            starts = [0, *accumulate(rank for rank, _ in layout)]
            columns = [
                (number, layout[number][1])
                for number in range(first, last + 1)
                for _ in range(layout[number][0])
            ]
            owner_S = torch.tensor([number for number, _ in columns], dtype=torch.long)
            scale_S = torch.tensor([scale for _, scale in columns])
            mask_NS = (self._adapter_N[:, None] == owner_S) * scale_S
            self._masks[layout] = slice(starts[first], starts[last + 1]), mask_NS.to(device)
        return self._masks[layout]


class SwitchedLinear(nn.Module):
    """A frozen linear layer with an update for the tokens of each adapter.

    ``updates`` has an update or None for each adapter of the switch.
    """

    def __init__(
        self,
        base: nn.Module,
        updates: Sequence[LayerUpdate | None],
        switch: AdapterSwitch,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.base, self.switch = base, switch
        self._layout: Layout = tuple(
            (0, 0.0) if each is None else (len(each[0]), each[2]) for each in updates
        )
        given = [each for each in updates if each is not None]
        self._a_SD = torch.cat([a_RD.float() for a_RD, _, _ in given]).to(device)
        self._b_SO = torch.cat([b_OR.float().T for _, b_OR, _ in given]).to(device)

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, (self,))[0]

    def together(self, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """Apply ``layers`` (this is the first) to ``x``. The frozen layers run in one call if they can."""
        bases = [layer.base if isinstance(layer, SwitchedLinear) else layer for layer in layers]
        outs = project(x, *bases)
        if self.switch.active:
            x_ND = x.flatten(0, -2).float()
            for layer, y in zip(layers, outs, strict=True):
                if isinstance(layer, SwitchedLinear):
                    layer._update(x_ND, y.flatten(0, -2))
        return outs

    def _update(self, x_ND: Tensor, y_NO: Tensor) -> None:
        """Add to each token of ``y`` the update of its adapter, in place."""
        rows, mask_NS = self.switch.mask(self._layout, x_ND.device)
        thin_NS = (x_ND @ self._a_SD[rows].T).mul_(mask_NS)
        if y_NO.dtype == thin_NS.dtype:
            y_NO.addmm_(thin_NS, self._b_SO[rows])
        else:
            y_NO += thin_NS @ self._b_SO[rows]


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
        own = [updates.get(layer_name) for updates in adapters.values()]
        for name, update in zip(adapters, own, strict=True):
            if update is not None and (len(update[1]), update[0].shape[1]) != (
                base.out_features,
                base.in_features,
            ):
                raise ConfigError(
                    f"adapter {name!r} is for a {layer_name} of another size: it has another base model"
                )
        parent, _, leaf = layer_name.rpartition(".")
        switched = SwitchedLinear(cast("nn.Module", base), own, switch, model.device)
        setattr(model.get_submodule(parent), leaf, switched)
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
