"""Low-rank adapters (LoRA): a frozen linear layer plus a trained product of two thin matrices.

A `LoraLinear` takes the place of any linear layer of a model, plain or packed, so the forward does not
change: ``y = base(x) + scale · (x Aᵀ) Bᵀ``. Only A and B have gradients, and the weights of the base may have
any format. ``scale`` is alpha / rank, or alpha / √rank for rank-stabilized adapters (rsLoRA, arXiv
2312.03732).

With a magnitude m (DoRA, arXiv 2402.09353) the rows of the adapted weight W' = W + scale · B A also have
trained lengths: ``y = m / ‖W'‖ · W' x``. The lengths ‖W'‖ count as constants in the backward pass (section
4.3 there), as in PEFT.

Shapes: R rank, D inputs, O outputs.
Source: Hu et al., LoRA (arXiv 2106.09685); targets and constants: "LoRA without regret" (Thinking Machines,
2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .model import LlamaLM, project

LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer. "LoRA without regret" finds that all of them should be adapted."""
TARGETS = (*LAYER_LINEARS, "lm_head")


class LoraLinear(nn.Module):
    """A linear layer whose weight ``base`` is frozen, with a trained update of low rank.

    A is drawn uniformly from ``seed``, as in PEFT, and B is zero, so the layer begins as its base. With
    ``dora``, the lengths of the rows are trained too.
    """

    def __init__(
        self, base: nn.Module, rank: int, scale: float, seed: int = 0, *, dora: bool = False
    ) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        bound = 1 / math.sqrt(self.in_features)
        a_RD = (2 * torch.rand(rank, self.in_features, generator=generator) - 1) * bound
        device = next(base.buffers(), next(base.parameters(), a_RD)).device
        self.lora_A = nn.Parameter(a_RD.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.lora_magnitude: nn.Parameter | None = None
        self._lengths: tuple[tuple[int, ...], Tensor] | None = None
        if dora:
            self.lora_magnitude = nn.Parameter(self._row_lengths())

    @property
    def weight(self) -> Tensor:
        """The merged weight (O, D) in the dtype of the adapter."""
        return self.merged(self.lora_A.dtype)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """Return the merged weight (O, D), computed in ``dtype``."""
        merged_OD = cast("Tensor", self.base.weight).to(dtype)
        merged_OD = merged_OD + self.scale * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))
        if self.lora_magnitude is None:
            return merged_OD
        ratio_O = self.lora_magnitude.to(dtype) / merged_OD.detach().norm(dim=1)
        return ratio_O[:, None] * merged_OD

    def _row_lengths(self) -> Tensor:
        """Return the lengths (O,) of the rows of the base plus the update, computed once for each update."""
        state = (self.lora_A._version, self.lora_B._version, id(self.lora_A), id(self.lora_B))
        if self._lengths is None or self._lengths[0] != state:
            # lengths that an evaluation in inference mode computes may be used by the next training step
            with torch.inference_mode(False), torch.no_grad():
                base_OD = cast("Tensor", self.base.weight).to(self.lora_A.dtype)
                lengths_O = torch.addmm(base_OD, self.lora_B, self.lora_A, alpha=self.scale).norm(dim=1)
            self._lengths = state, lengths_O
        return self._lengths[1]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen layer."""
        return cast("Tensor | None", self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, (self,))[0]

    def together(self, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """Apply ``layers`` (this is the first) to ``x``. The frozen layers run in one call if they can.

        So do the matrices A, whose products are too thin to be efficient alone.
        """
        x_ND = x.flatten(0, -2)
        autocast = torch.is_autocast_enabled(x.device.type)
        bases = [layer.base if isinstance(layer, LoraLinear) else layer for layer in layers]
        outs = project(x_ND if autocast else x_ND.to(_dtype(bases[0], x.dtype)), *bases)
        adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
        a_RD = torch.cat([layer.lora_A for layer in adapted]) if len(adapted) > 1 else self.lora_A
        h_NR = F.linear(x_ND if autocast else x_ND.to(a_RD.dtype), a_RD)
        parts = iter(h_NR.split([len(layer.lora_A) for layer in adapted], dim=-1))
        for number, layer in enumerate(layers):
            if isinstance(layer, LoraLinear):
                dtype = outs[number].dtype if autocast else x.dtype
                outs[number] = layer._updated(outs[number].to(dtype), next(parts))
        return [out.view(*x.shape[:-1], -1) for out in outs]

    def _updated(self, y_NO: Tensor, h_NR: Tensor) -> Tensor:
        """Return ``y_NO``, which is overwritten, plus the update, given A x."""
        dtype = y_NO.dtype
        out = y_NO.addmm_(h_NR.to(dtype), self.lora_B.to(dtype).T, alpha=self.scale)
        if self.lora_magnitude is None:
            return out
        ratio_O = (self.lora_magnitude / self._row_lengths()).to(dtype)
        if self.bias is None:
            return ratio_O * out
        bias_O = self.bias.to(dtype)
        return ratio_O * (out - bias_O) + bias_O

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={len(self.lora_A)}, scale={self.scale:g}"


def _dtype(layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a plain layer's weight, or ``default`` for a packed layer, which takes any."""
    weight = layer._parameters.get("weight")
    return default if weight is None else weight.dtype


def scale_of(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """Return the factor of an adapter's update."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def add_lora(
    model: LlamaLM,
    rank: int,
    scale: float,
    targets: Sequence[str] = LAYER_LINEARS,
    *,
    seed: int = 0,
    dora: bool = False,
) -> LlamaLM:
    """Freeze a model and put an adapter on each of its linear layers named in ``targets``, in place.

    Raises `ConfigError` for an unknown target and for a rank that is larger than a matrix.
    """
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ConfigError(f"adapter target {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    for number, name in enumerate(names):
        base = model.get_submodule(name)
        if rank > (most := min(int(base.in_features), int(base.out_features))):  # type: ignore[arg-type]
            raise ConfigError(f"rank={rank} exceeds the size of {name}; choose at most {most}")
        parent, _, leaf = name.rpartition(".")
        layer = LoraLinear(base, rank, scale, seed * 1_000_003 + number, dora=dora)
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merged_parameter(model: LlamaLM, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the parameter ``name`` of the model without adapters, with an adapter's update added to it.

    The sum is computed in ``dtype``.
    """
    module_name, _, leaf = name.rpartition(".")
    if name == "lm_head.weight" and model.config.tie_embeddings:
        module_name = "model.embed_tokens"
    layer = model.get_submodule(module_name)
    if not isinstance(layer, LoraLinear):
        return cast("Tensor", getattr(layer, leaf)).detach().to(dtype)
    if leaf == "bias":
        return cast("Tensor", layer.base.bias).detach().to(dtype)
    return layer.merged(dtype).detach()
