"""Prune a Llama to a smaller one with the same parameter names and an ordinary configuration.

Width (channels, FFN neurons, query heads inside each KV group) and depth (a contiguous run of layers) are
pruned together, by `importance`. KV heads and the head dim are kept, as in both Llama Minitrons (arXiv
2408.11796). The result must be distilled to be good again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import ConfigError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from .importance import Importance, best_block, importance


@dataclass(frozen=True)
class PruneMask:
    """The kept indices, ascending: layers, channels (D',), and each layer's heads (H',) and neurons (F',)."""

    layers: list[int]
    channels: Tensor
    heads: list[Tensor]
    neurons: list[Tensor]


def check_target(source: ModelConfig, target: ModelConfig) -> None:
    """Raise `ConfigError` unless ``source`` can be pruned to ``target``."""
    for name in (
        "vocab_size", "n_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_scaling", "tie_embeddings",
        "attention_bias", "mlp_bias",
    ):  # fmt: skip
        theirs, ours = getattr(source, name), getattr(target, name)
        if theirs != ours:
            raise ConfigError(f"pruning keeps {name}: the teacher has {theirs}, the student asks for {ours}")
    for name in ("dim", "n_layers", "n_heads", "ffn_dim"):
        if getattr(target, name) > getattr(source, name):
            raise ConfigError(f"{name}={getattr(target, name)} exceeds the teacher's {getattr(source, name)}")


def choose(source: ModelConfig, target: ModelConfig, scores: Importance, drop: Collection[int]) -> PruneMask:
    """Return the mask of the best-scoring parts for ``target``, without the layers in ``drop``."""
    layers = [i for i in range(source.n_layers) if i not in drop]
    group, group_kept = source.n_heads // source.n_kv_heads, target.n_heads // target.n_kv_heads

    def top(scores_X: Tensor, count: int) -> Tensor:
        return scores_X.topk(count).indices.sort().values

    def top_heads(scores_H: Tensor) -> Tensor:
        inside = scores_H.view(source.n_kv_heads, group).topk(group_kept, dim=1).indices.sort(dim=1).values
        return (inside + torch.arange(source.n_kv_heads)[:, None] * group).flatten()

    return PruneMask(
        layers=layers,
        channels=top(scores.channels_D, target.dim),
        heads=[top_heads(scores.heads_LH[i]) for i in layers],
        neurons=[top(scores.neurons_LF[i], target.ffn_dim) for i in layers],
    )


@torch.no_grad()
def cut(model: LlamaLM, target: ModelConfig, kept: PruneMask) -> LlamaLM:
    """Return a model of shape ``target`` with the kept rows and columns of the weights of ``model``."""
    K = target.head_dim
    source = model.state_dict()
    out: dict[str, Tensor] = {}
    channels = kept.channels
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        out[name] = source[name][:, channels]
    out["model.norm.weight"] = source["model.norm.weight"][channels]
    for new, (old, heads, neurons) in enumerate(zip(kept.layers, kept.heads, kept.neurons, strict=True)):
        here, there = f"model.layers.{new}.", f"model.layers.{old}."
        rows = (heads[:, None] * K + torch.arange(K)).flatten()
        out[here + "self_attn.q_proj.weight"] = source[there + "self_attn.q_proj.weight"][rows][:, channels]
        out[here + "self_attn.o_proj.weight"] = source[there + "self_attn.o_proj.weight"][channels][:, rows]
        for side in ("k_proj", "v_proj"):
            out[here + f"self_attn.{side}.weight"] = source[there + f"self_attn.{side}.weight"][:, channels]
        for side in ("gate_proj", "up_proj"):
            out[here + f"mlp.{side}.weight"] = source[there + f"mlp.{side}.weight"][neurons][:, channels]
        out[here + "mlp.down_proj.weight"] = source[there + "mlp.down_proj.weight"][channels][:, neurons]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[here + f"{norm}.weight"] = source[there + f"{norm}.weight"][channels]
        outputs = {"q_proj": rows, "o_proj": channels, "gate_proj": neurons, "up_proj": neurons}
        outputs |= {"down_proj": channels}  # those of k and v are kept whole
        for name in [name for name in source if name.startswith(there) and name.endswith(".bias")]:
            side = name.split(".")[-2]
            out[name.replace(there, here)] = source[name][outputs[side]] if side in outputs else source[name]
    with torch.device(model.device):
        student = LlamaLM(target)
    student.to(model.dtype).load_state_dict(out)
    return student


def prune(model: LlamaLM, target: ModelConfig, batches: Sequence[Batch]) -> tuple[LlamaLM, PruneMask]:
    """Return ``model`` pruned to ``target`` by importance on calibration ``batches``, and the mask.

    ``model`` itself is not changed. Raises `ConfigError` if it cannot be pruned to ``target``.
    """
    check_target(model.config, target)
    n_drop = model.config.n_layers - target.n_layers
    drop = best_block(model, n_drop, batches) if n_drop else range(0)
    kept = choose(model.config, target, importance(model, batches), drop)
    return cut(model, target, kept), kept
