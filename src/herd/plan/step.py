"""Seconds of one training step for a layout: compute, memory traffic, collectives and the bubble.

One micro-batch through one stage is a list of operators (`ops.layer_ops`), run forward and backward:

    backward   each matmul runs twice, for the gradients of its input and of its weight (added to fp32 in
               memory); attention takes 2.5 times its forward pass, because it is recomputed (FlashAttention);
               other operators move twice the bytes
    FP8        matmuls run at the FP8 rate. Casting reads each operand in bf16 and writes it in 8 bits
    TP         per layer two all-gathers and two reduce-scatters of the rows in forward. In backward the same
               and two more gathers, for the gradients of the weights (Korthikanti et al., arXiv 2205.05198).
               They are exposed unless they are asynchronous
    CP         K and V are gathered before attention, their gradients are scattered after it
    PP         rows are sent to the next stage, V times per micro-batch. The bubble is (PP - 1) / (V · M) of
               the rest
    DP         weights are gathered and gradients scattered in fp32, once per step, or with FSDP for every
               micro-batch. This overlaps with compute and then takes some of the chip's cores (`CONTENTION`)

Nothing here is fitted to a training run. A fit can only add a `Tuning`: factors on these parts, by default 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..llama.config import ModelConfig
from ..train.memory import MASTER
from .layout import Job, ParallelLayout, check_layout, micro_batches, stage_layers
from .machines import Machine
from .memory import WEIGHT, Parts, stage_params
from .ops import BF16, FP8, FP32, head_ops, layer_ops
from .roofline import Device, Op, all_gather, all_reduce, operator_cost, send

CONTENTION = 20 / 132
"""Fraction of compute lost while collectives run at the same time.

20 of a Hopper's 132 multiprocessors move data (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
"""
ATTENTION_BACKWARD = 2.5
"""Operations of attention's backward divided by its forward (FlashAttention-2, arXiv 2307.08691, 4.1)."""
RECOMPUTED = {"plain": 0.0, "none": 0.0, "selective": 0.5, "full": 1.0}
"""Fraction of the forward matmuls that is computed again."""
ASYNC_TP = 0.5
"""Fraction of TP's collectives that PyTorch's asynchronous TP (with symmetric memory) cannot hide."""


@dataclass(frozen=True)
class Tuning:
    """Correction factors for the software of measured runs, in addition to the hardware's data."""

    gemm: float = 1.0  # on matmul time
    fp8: float = 1.0  # on FP8 matmul time, in addition
    pointwise: float = 1.0  # on memory-bound operators, which code without a compiler runs one by one
    exposed_tp: float = 1.0  # fraction of TP's collectives that is not hidden
    attention: float = 1.0


HARDWARE = Tuning()


@dataclass(frozen=True)
class Step(Parts):
    """Seconds of one step on the slowest stage, by part."""

    gemm: float
    attention: float
    memory: float
    recompute: float
    tp: float
    cp: float
    pp: float
    dp: float
    optimizer: float
    bubble: float

    @property
    def seconds(self) -> float:
        return self.total


def predict_step(job: Job, layout: ParallelLayout, machine: Machine, tuning: Tuning = HARDWARE) -> Step:
    """Return the seconds of one step. Raises `PlanError` if the layout does not divide the job."""
    check_layout(layout, job)
    return step_time(job, layout, machine, tuning)


def step_time(job: Job, layout: ParallelLayout, machine: Machine, tuning: Tuning = HARDWARE) -> Step:
    """Return the seconds of one step of a layout that divides the job (`layout.check_layout`)."""
    config, device, micros = job.config, machine.device, micro_batches(layout, job)
    middle, end = stage_layers(config.n_layers, layout.pp) or (config.n_layers, config.n_layers)
    rows, keys = layout.micro * job.context // layout.cp, job.context / 2
    frozen = job.adapters is not None
    cached = layout.micro * job.context
    layer = _layer_time(config, rows, keys, cached, layout.tp, layout.precision, frozen, device, tuning)
    if frozen and job.frozen_bytes < WEIGHT:
        layer = layer.plus(_unpack_time(config, layout.tp, job.frozen_bytes, device))
    last = layer.times(end).plus(_head_time(config, rows, layout.tp, frozen, device, tuning))
    stages = [last] if layout.pp == 1 else [layer.times(middle), last]
    whole = max(stages, key=lambda stage: stage.total).times(micros)
    again = RECOMPUTED[layout.recompute]
    recompute = again * whole.forward_gemm + again * whole.memory / 3
    if again == 1:
        recompute += whole.forward_attention
    tp = micros * middle * _tp_time(config, rows, layout, machine, tuning, again == 1)
    cp = micros * middle * _cp_time(config, cached, layout, machine)
    pp = micros * _pp_time(config, rows, layout, machine)
    busy = whole.total + recompute + tp + cp + pp
    return Step(
        gemm=whole.gemm,
        attention=whole.attention,
        memory=whole.memory,
        recompute=recompute,
        tp=tp,
        cp=cp,
        pp=pp,
        dp=_dp_time(job, layout, machine, micros, whole.total + recompute),
        optimizer=_optimizer_time(job, layout, device),
        bubble=busy * (layout.pp - 1) / (layout.chunks * micros),
    )


def model_flops_utilization(job: Job, machine: Machine, seconds: float) -> float:
    """Return the MFU: model FLOPs per second as a fraction of the data sheet's bf16 peak."""
    return job.flops / seconds / (machine.count * machine.device.peak("bf16"))


class _Compute(NamedTuple):
    """Seconds of compute by kind."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    forward_gemm: float = 0.0
    forward_attention: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory

    def times(self, factor: float) -> _Compute:
        return _Compute(*(factor * value for value in self))

    def plus(self, other: _Compute) -> _Compute:
        return _Compute(*(a + b for a, b in zip(self, other, strict=True)))


@functools.lru_cache(maxsize=8192)
def _layer_time(
    config: ModelConfig,
    rows: int,
    keys: float,
    cached: int,
    tp: int,
    precision: str,
    frozen: bool,
    device: Device,
    tuning: Tuning,
) -> _Compute:
    weights = {"fp8": FP8, "fp32": FP32}.get(precision, BF16)
    ops = layer_ops(config, rows, keys, cached, weights=weights, tp=tp, split_rows=True)
    return _compute_time(ops, frozen, device, tuning)


@functools.lru_cache(maxsize=1024)
def _head_time(
    config: ModelConfig, rows: int, tp: int, frozen: bool, device: Device, tuning: Tuning
) -> _Compute:
    return _compute_time(head_ops(config, rows, tp=tp), frozen, device, tuning)


def _compute_time(ops: list[Op], frozen: bool, device: Device, tuning: Tuning) -> _Compute:
    """Return the seconds of forward and backward.

    Frozen weights pass gradients on but have none of their own.
    """

    def moving(nbytes: float) -> float:
        return operator_cost(Op("move", "memory", 0.0, nbytes), device).seconds

    gemm = attention = memory = forward_gemm = forward_attention = 0.0
    for op in ops:
        once = operator_cost(op, device).seconds
        if op.kind == "gemm":
            params = op.flops / 2 / op.rows
            values_per_row = (op.nbytes - params) / 2 / op.rows  # read and written
            once *= tuning.gemm * (tuning.fp8 if op.dtype == "fp8" else 1.0)
            forward_gemm += once
            gemm += (2 if frozen else 3) * once
            if not frozen:  # adding the gradient to fp32 costs memory traffic only
                add = Op("add to fp32", "memory", 0.0, 2 * MASTER * params)
                memory += operator_cost(add, device).memory * tuning.pointwise
            if op.dtype == "fp8":
                # x and w forward and dy twice in backward: read 2 bytes, write 1, and its transpose
                cast = 3 * (2 * op.rows * values_per_row + 2 * params)
                memory += moving(cast) * tuning.pointwise
        elif op.kind == "attention":
            flops, nbytes = ATTENTION_BACKWARD * op.flops, ATTENTION_BACKWARD * op.nbytes
            backward = replace(op, kind="attention_backward", flops=flops, nbytes=nbytes)
            forward_attention = once * tuning.attention
            attention += forward_attention + operator_cost(backward, device).seconds * tuning.attention
        else:
            memory += 3 * once * tuning.pointwise
    return _Compute(gemm, attention, memory, forward_gemm, forward_attention)


@functools.lru_cache(maxsize=256)
def _unpack_time(config: ModelConfig, tp: int, width: float, device: Device) -> _Compute:
    """Return the seconds of unpacking quantized frozen weights to bf16 before each of their two uses."""
    params = stage_params(config.replace(tie_embeddings=True), 1) - config.vocab_size * config.dim
    op = Op("unpack", "memory", 0.0, params / tp / config.n_layers * (width + WEIGHT))
    return _Compute(memory=2 * operator_cost(op, device).seconds)


def _tp_time(
    config: ModelConfig, rows: int, layout: ParallelLayout, machine: Machine, tuning: Tuning, recompute: bool
) -> float:
    """Return the exposed seconds of one layer's TP collectives in forward and backward."""
    if layout.tp == 1:
        return 0.0
    collectives = 4 + 6 + (2 if recompute else 0)
    exposed = tuning.exposed_tp * (ASYNC_TP if layout.async_tp else 1.0)
    return exposed * collectives * all_gather(WEIGHT * rows * config.dim, layout.tp, machine.join(layout.tp))


def _cp_time(config: ModelConfig, tokens: int, layout: ParallelLayout, machine: Machine) -> float:
    """Return the seconds of gathering K and V of a layer twice and scattering their gradients."""
    if layout.cp == 1:
        return 0.0
    link = machine.join(layout.cp, layout.tp)
    values = 2 * tokens * max(config.n_kv_heads // layout.tp, 1) * config.head_dim
    return all_gather(WEIGHT * values, layout.cp, link) * 2 + all_gather(MASTER * values, layout.cp, link)


def _pp_time(config: ModelConfig, rows: int, layout: ParallelLayout, machine: Machine) -> float:
    """Return the seconds of sending a micro-batch's rows to the next stage and their gradients back.

    Interleaved schedules send while they compute, because the next stage does not need the rows at once. Only
    the contention remains.
    """
    if layout.pp == 1:
        return 0.0
    link = machine.join(2, layout.tp * layout.cp)
    each = send(WEIGHT * rows * config.dim / layout.tp, link)
    return 2 * layout.chunks * (each * CONTENTION if layout.chunks > 1 else each)


def _dp_time(job: Job, layout: ParallelLayout, machine: Machine, micros: int, compute: float) -> float:
    """Return the seconds that gathering weights and scattering gradients add to ``compute`` seconds."""
    ranks = layout.sharers
    if layout.dp * layout.cp == 1:
        return 0.0
    # States are sharded over CP and DP together. Their ranks are TP apart, and in a pipeline also PP apart.
    link = machine.join(ranks, layout.tp)
    if layout.pp > 1:
        link = machine.join(max(1, ranks // layout.cp), layout.tp * layout.cp * layout.pp)
    params = stage_params(job.config, layout.pp) / layout.tp
    trained = params if job.adapters is None else job.adapters / layout.tp / layout.pp
    width = WEIGHT if job.adapters is None else job.frozen_bytes
    gather, scatter = all_gather(width * params, ranks, link), all_gather(MASTER * trained, ranks, link)
    if job.adapters is not None and layout.shard != "all":
        gather = 0.0  # every rank has the frozen weights
    if layout.shard == "all":
        total = micros * (2 * gather + scatter)
    elif layout.shard == "gradients" and layout.pp > 1:
        total = gather + scatter * max(1, micros // layout.pp)
    else:
        total = gather + scatter
    if layout.replicas > 1:
        between = machine.join(layout.replicas, layout.tp * ranks * layout.pp)
        total += all_reduce(MASTER * trained / ranks, layout.replicas, between)
    hidden = min(total, compute)
    return total - hidden + CONTENTION * hidden


def _optimizer_time(job: Job, layout: ParallelLayout, device: Device) -> float:
    """Return the seconds of Adam and clipping.

    Adam reads weight, gradient and both moments, and writes weight, moments and the bf16 copy. Clipping reads
    the gradient once more.
    """
    trained = stage_params(job.config, layout.pp) if job.adapters is None else job.adapters / layout.pp
    params = trained / layout.tp / layout.sharers
    adam = Op("adam", "memory", 0.0, params * (5 * MASTER + 3 * MASTER + WEIGHT))
    return operator_cost(adam, device).seconds
