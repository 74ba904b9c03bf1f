"""Memory of one rank of a training run by purpose, from `herd.train.memory` split over TP, CP and PP.

With sequence parallelism, everything that a layer keeps for backward is split over TP (rows between the
matmuls, heads and FFN columns inside them) and over CP. In a pipeline the first stage needs most: with V
chunks per stage, it stores the activations of PP · (1 + (PP - 1) / (PP · V)) micro-batches at once (Narayanan
et al., arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from ..llama.config import ModelConfig
from ..train.memory import MASTER, TrainBytes, train_nbytes
from .layout import Job, ParallelLayout, micro_batches, stage_layers

WEIGHT = 2  # bytes of the compute copy: bf16, also if matmuls run in FP8
RESERVED = 3e9
"""Bytes of an accelerator taken by the driver, workspaces of cuBLAS and others, and NCCL's buffers."""
FRAGMENTED = 0.04
"""Fraction of a device's memory that a caching allocator cannot use."""


class Parts:
    """Base of dataclasses whose fields are amounts of one unit, with their total."""

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    def total(self) -> float:
        return sum(self.parts().values())


@dataclass(frozen=True)
class RankBytes(Parts):
    """Bytes of the fullest rank by purpose."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float


@functools.lru_cache(maxsize=256)
def first_stage(config: ModelConfig, pp: int) -> ModelConfig:
    """Return the part of a model in the first pipeline stage.

    It is described as a model with tied embeddings, because a stage has either the embedding or the head.
    """
    if pp == 1:
        return config
    _, end = stage_layers(config.n_layers, pp) or (0, config.n_layers // pp)
    return config.replace(n_layers=max(end, 1), tie_embeddings=True)


@functools.lru_cache(maxsize=256)
def stage_params(config: ModelConfig, pp: int) -> int:
    """Return the number of parameters of the first stage."""
    return first_stage(config, pp).n_params


def in_flight(layout: ParallelLayout, micros: int) -> float:
    """Return the number of micro-batches whose activations the first stage stores at once."""
    if layout.pp == 1:
        return 1.0
    interleaved = (layout.pp - 1) / layout.chunks if layout.chunks > 1 else 0.0
    return min(float(micros), layout.pp + interleaved)


def rank_nbytes(job: Job, layout: ParallelLayout) -> RankBytes:
    """Return the bytes of the fullest rank of a layout."""
    ranks, tp = layout.sharers, layout.tp
    rows = job.context // layout.cp
    stage = first_stage(job.config, layout.pp)
    sharded = layout.dp * layout.cp > 1
    kept, least = (_unsplit(stage, layout.micro, rows, again, sharded) for again in (False, True))
    # Plain autograd also keeps the outputs of both norms and of a fused SwiGLU.
    matmul_inputs = WEIGHT * layout.micro * rows * stage.n_layers * (2 * stage.dim + stage.ffn_dim)
    activations = {
        "plain": kept.activations + float(matmul_inputs),
        "none": kept.activations,
        "selective": (kept.activations + least.activations) / 2,  # keeps every other matmul's output
        "full": least.activations,
    }[layout.recompute]
    held = activations / tp * in_flight(layout, micro_batches(layout, job))
    params = kept.weights / MASTER / tp
    if job.adapters is not None:
        return _adapter_nbytes(job, layout, params, kept, held)
    gradients = kept.gradients / tp / ranks
    if layout.shard == "gradients" and ranks > 1:
        gradients += kept.gradients / tp / layout.chunks
    return RankBytes(
        weights=kept.gathered / tp if layout.shard == "all" else WEIGHT * params,
        gradients=kept.gradients / tp if layout.shard == "optimizer" else gradients,
        optimizer=(kept.weights + kept.moments) / tp / ranks,
        activations=held,
        loss=kept.loss / tp if layout.pp == 1 else 0.0,
        buffers=_gathered_rows(job, layout),
    )


def _adapter_nbytes(
    job: Job, layout: ParallelLayout, params: float, kept: TrainBytes, activations: float
) -> RankBytes:
    """Return the bytes with adapters: frozen weights as stored, and optimizer state for the adapters only."""
    ranks = layout.sharers
    trained = (job.adapters or 0) / layout.tp / layout.pp
    sharded = layout.shard == "all" and ranks > 1
    one_layer = params / max(first_stage(job.config, layout.pp).n_layers, 1)
    return RankBytes(
        weights=job.frozen_bytes * (params / ranks if sharded else params) + WEIGHT * one_layer,
        gradients=MASTER * trained,
        optimizer=3 * MASTER * trained / (ranks if sharded else 1),
        activations=activations,
        loss=max(0.0, kept.loss - MASTER * job.config.vocab_size * job.config.dim) / layout.tp,
        buffers=_gathered_rows(job, layout),
    )


@functools.lru_cache(maxsize=4096)
def _unsplit(stage: ModelConfig, micro: int, rows: int, checkpointing: bool, sharded: bool) -> TrainBytes:
    ranks = 2 if sharded else 1
    return train_nbytes(stage, micro, rows, dtype="bf16", activation_checkpointing=checkpointing, ranks=ranks)


def _gathered_rows(job: Job, layout: ParallelLayout) -> float:
    """Return the bytes of one layer's rows gathered for a matmul (TP) and K and V (CP), with gradients."""
    config, rows = job.config, layout.micro * job.context
    gathered = 2 * WEIGHT * rows / layout.cp * config.dim if layout.tp > 1 else 0.0
    kv_heads = max(config.n_kv_heads // layout.tp, 1)
    kv = 4 * WEIGHT * rows * kv_heads * config.head_dim if layout.cp > 1 else 0.0
    return gathered + kv


def usable_memory(device_memory: float) -> float:
    """Return the bytes of a device that tensors can use."""
    return device_memory * (1 - FRAGMENTED) - min(RESERVED, 0.1 * device_memory)
