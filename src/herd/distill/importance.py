"""Measure the importance of heads, neurons, channels and layers with forward passes only.

Minitron (arXiv 2407.14679, section 2.2) ranks the parts of a model by their activations on calibration text:

- a query head by the L2 norm of its attention output, before ``o_proj``;
- an FFN neuron by the magnitude of its input to ``down_proj``;
- a hidden channel by the magnitude of the norms' outputs, summed over every norm of the network, one global
  ranking because the residual stream is shared.

Magnitudes are averaged over time, then combined over rows by an L2 norm, as in ModelOpt. Layers are ranked by
the loss of the network without them (`best_block`), in contiguous runs only, since removing single layers
raises the loss more.

Shapes: B rows, T time, L layers, H query heads, K head dim, F ffn dim, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data.batch import Batch
from ..errors import ConfigError
from ..llama.model import DecoderLayer, LlamaLM
from ..train.heldout import heldout_loss


@dataclass(frozen=True)
class Importance:
    """Scores of heads (L, H), neurons (L, F) and channels (D,), fp32 on the CPU. The highest are kept."""

    heads_LH: Tensor
    neurons_LF: Tensor
    channels_D: Tensor


def _energy(x_BTX: Tensor) -> Tensor:
    """Return the mean magnitude over the tokens of a row, squared and summed over rows, (X,)."""
    return x_BTX.float().abs().mean(dim=1).square().sum(dim=0)


@torch.no_grad()
def importance(model: LlamaLM, batches: Iterable[Batch]) -> Importance:
    """Score every part of ``model`` with one forward of each of the calibration ``batches``."""
    config = model.config
    heads_LH = torch.zeros(config.n_layers, config.n_heads)
    neurons_LF = torch.zeros(config.n_layers, config.ffn_dim)
    channels_D = torch.zeros(config.dim)
    n_batches = 0
    handles: list[RemovableHandle] = []

    def watch_input(module: nn.Module, sink: Tensor, measure: Callable[[Tensor], Tensor]) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sink.add_(measure(args[0]).cpu())

        handles.append(module.register_forward_pre_hook(hook))

    def watch_output(module: nn.Module) -> None:
        def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            channels_D.add_(_energy(out).cpu())

        handles.append(module.register_forward_hook(hook))

    def head_energy(x_BTHK: Tensor) -> Tensor:
        return _energy(x_BTHK.unflatten(-1, (config.n_heads, config.head_dim)).float().norm(dim=-1))

    for index, block in enumerate(cast("list[DecoderLayer]", model.model.layers)):
        watch_input(block.self_attn.o_proj, heads_LH[index], head_energy)
        watch_input(block.mlp.down_proj, neurons_LF[index], _energy)
        watch_output(block.input_layernorm)
        watch_output(block.post_attention_layernorm)
    watch_output(model.model.norm)
    try:
        for batch in batches:
            batch = batch.to(model.device)
            model(batch.tokens_BT, batch.positions_BT, batch.attend)
            n_batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not n_batches:
        raise ConfigError("importance needs at least one calibration batch, got none")
    return Importance(heads_LH.sqrt(), neurons_LF.sqrt(), channels_D.sqrt())


def random_importance(model: LlamaLM, seed: int) -> Importance:
    """Return random scores, the baseline that `importance` must beat."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    return Importance(
        drawn(config.n_layers, config.n_heads), drawn(config.n_layers, config.ffn_dim), drawn(config.dim)
    )


def uniform_layers(n_layers: int, n_drop: int) -> list[int]:
    """Return ``n_drop`` evenly spaced inner layers, the baseline that `best_block` must beat."""
    if n_drop == 0:
        return []
    step = (n_layers - 2) / n_drop
    return [1 + int(step * (i + 0.5)) for i in range(n_drop)]


@torch.no_grad()
def best_block(model: LlamaLM, n_drop: int, batches: Sequence[Batch]) -> range:
    """Return the ``n_drop`` contiguous layers whose removal raises the loss on ``batches`` least.

    The first and the last layer are kept, since removing them costs most in every Llama measured (Minitron,
    section 2.3).
    """
    n_layers = model.config.n_layers
    if not 0 <= n_drop <= n_layers - 2:
        raise ConfigError(f"cannot drop {n_drop} of {n_layers} layers and keep the first and the last")
    layers = list(model.model.layers)

    def loss_without(drop: range) -> float:
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in drop)
        try:
            return heldout_loss(model, batches)
        finally:
            model.model.layers = nn.ModuleList(layers)

    candidates = [range(start, start + n_drop) for start in range(1, n_layers - n_drop)]
    return min(candidates, key=loss_without)
