"""Bytes on one rank of a training run, by what they are for: `herd.train.memory`, split over TP, CP and PP.

With sequence parallelism everything a block keeps for backward is split over TP (rows between the matmuls,
heads and F inside them) and over CP. In a pipeline the first stage holds most: with V pieces a stage, PP · (1
+ (PP - 1) / (PP · V)) micro-batches' worth of its layers are under way at once (Narayanan et al., arXiv
2104.04473, section 2.2)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from ..llama.config import ModelConfig
from ..train.memory import MASTER, TrainBytes, train_nbytes
from .layout import Job, ParallelLayout, micro_batches, stage_layers

WEIGHT = 2  # bytes of the compute copy: bf16, also where matmuls run in FP8
RESERVED = 3e9
"""Bytes that the driver, the libraries' workspaces and NCCL's buffers take of an accelerator."""
FRAGMENTED = 0.04
"""Share of a device that a caching allocator cannot fill."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of the fullest rank, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by part, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@functools.lru_cache(maxsize=256)
def first_stage(config: ModelConfig, pp: int) -> ModelConfig:
    """The part of a model that the first stage holds. Of embedding and head a stage of a pipeline has one, as
    in a model that ties them."""
    if pp == 1:
        return config
    _, end = stage_layers(config.n_layers, pp) or (0, config.n_layers // pp)
    return config.replace(n_layers=max(end, 1), tie_embeddings=True)


@functools.lru_cache(maxsize=256)
def stage_params(config: ModelConfig, pp: int) -> int:
    """Parameters of the first stage."""
    return first_stage(config, pp).n_params


def in_flight(layout: ParallelLayout, micros: int) -> float:
    """Micro-batches' worth of its activations that the first stage holds at once."""
    if layout.pp == 1:
        return 1.0
    return min(float(micros), layout.pp + ((layout.pp - 1) / layout.chunks if layout.chunks > 1 else 0.0))


def rank_nbytes(job: Job, layout: ParallelLayout) -> RankBytes:
    """Bytes of the fullest rank of a layout."""
    ranks, tp = layout.sharers, layout.tp
    rows = job.context // layout.cp
    stage = first_stage(job.config, layout.pp)
    kept, least = (
        _whole(stage, layout.micro, rows, activation_checkpointing, layout.dp * layout.cp > 1)
        for activation_checkpointing in (False, True)
    )
    activations = {
        "plain": kept.activations + _matmul_inputs(stage, layout.micro * rows),
        "none": kept.activations,
        "selective": (kept.activations + least.activations) / 2,  # every other matmul's output is kept
        "full": least.activations,
    }[layout.recompute]
    params = kept.weights / MASTER / tp
    if job.adapters is not None:
        return _with_adapters(job, layout, params, kept, activations)
    gradients = {
        "all": kept.gradients / tp / ranks,
        "gradients": kept.gradients / tp / ranks + kept.gradients / tp / layout.chunks * (ranks > 1),
        "optimizer": kept.gradients / tp,
    }[layout.shard]
    return RankBytes(
        weights=kept.gathered / tp if layout.shard == "all" else WEIGHT * params,
        gradients=gradients,
        optimizer=(kept.weights + kept.moments) / tp / ranks,
        activations=activations / tp * in_flight(layout, micro_batches(layout, job)),
        loss=kept.loss / tp if layout.pp == 1 else 0.0,
        buffers=_gathered_rows(job, layout),
    )


def _with_adapters(
    job: Job, layout: ParallelLayout, params: float, kept: TrainBytes, activations: float
) -> RankBytes:
    """Frozen weights as they are stored, sharded or whole; state for the adapters alone; no gradient of the
    head."""
    ranks = layout.sharers
    trained = (job.adapters or 0) / layout.tp / layout.pp
    sharded = layout.shard == "all" and ranks > 1
    one_block = params / max(first_stage(job.config, layout.pp).n_layers, 1)
    return RankBytes(
        weights=job.frozen_bytes * (params / ranks if sharded else params) + WEIGHT * one_block,
        gradients=MASTER * trained,
        optimizer=3 * MASTER * trained / (ranks if sharded else 1),
        activations=activations / layout.tp * in_flight(layout, micro_batches(layout, job)),
        loss=max(0.0, kept.loss - MASTER * job.config.vocab_size * job.config.dim) / layout.tp,
        buffers=_gathered_rows(job, layout),
    )


@functools.lru_cache(maxsize=4096)
def _whole(
    stage: ModelConfig, micro: int, rows: int, activation_checkpointing: bool, sharded: bool
) -> TrainBytes:
    return train_nbytes(
        stage,
        micro,
        rows,
        dtype="bf16",
        activation_checkpointing=activation_checkpointing,
        ranks=2 if sharded else 1,
    )


def _matmul_inputs(stage: ModelConfig, tokens: int) -> float:
    """What plain autograd keeps besides: the outputs of both norms, and of a fused SwiGLU."""
    return float(WEIGHT * tokens * stage.n_layers * (2 * stage.dim + stage.ffn_dim))


def _gathered_rows(job: Job, layout: ParallelLayout) -> float:
    """Rows of the residual stream gathered for a matmul (TP) and K and V of the whole sequence (CP), of one
    layer, with their gradients."""
    config, rows = job.config, layout.micro * job.context
    gathered = 2 * WEIGHT * rows / layout.cp * config.dim if layout.tp > 1 else 0.0
    kv_heads = max(config.n_kv_heads // layout.tp, 1)
    kv = 4 * WEIGHT * rows * kv_heads * config.head_dim if layout.cp > 1 else 0.0
    return gathered + kv


def usable(device_memory: float) -> float:
    """Bytes of a device that tensors can have."""
    return device_memory * (1 - FRAGMENTED) - min(RESERVED, 0.1 * device_memory)
