"""Seconds of one training step on one layout, by part: compute, memory traffic, collectives on their links,
the bubble.

One micro-batch through one stage is a list of operators (`ops.layer_ops`), forward and backward:

    backward   each matmul twice (gradients of its input and of its weight, the latter added to fp32 in
    memory);
               attention 2.5 times its forward, for it is computed anew (FlashAttention); the rest moves twice
               the bytes
    FP8        matmuls at that rate; casting reads each operand in bf16 and writes it in 8 bits
    TP         two all-gathers and two reduce-scatters of the rows a block forward, as many backward and two
    gathers more
               for the weights' gradients (Korthikanti et al., arXiv 2205.05198); nothing overlaps them unless
               async
    CP         K and V gathered before attention, their gradients scattered after it
    PP         rows sent to the next stage, V times a micro-batch; the bubble is (PP - 1) / (V · M) of the
    rest DP         weights gathered and gradients scattered in fp32, once a step, or with FSDP every
    micro-batch, beside the
               compute as far as there is some; meanwhile it takes some of the chip's cores (`CONTENTION`)

Nothing here is fitted to a training run. What a fit can add is `Tuning`: factors on these parts, all 1 by
default.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from ..llama.config import ModelConfig
from ..train.memory import MASTER
from .layout import Job, ParallelLayout, check, micro_batches, stage_layers
from .machines import Machine
from .memory import WEIGHT, stage_params
from .ops import BF16, FP8, FP32, head_ops, layer_ops
from .roofline import Device, Link, Op, all_gather, all_reduce, cost, send

CONTENTION = 20 / 132
"""Share of compute lost while collectives run beside it: 20 of a Hopper's 132 multiprocessors move data
(DeepSeek-V3, arXiv 2412.19437, section 3.2.2)."""
ATTENTION_BACKWARD = 2.5  # of its forward's operations (FlashAttention-2, arXiv 2307.08691, section 4.1)
RECOMPUTED = {
    "plain": 0.0,
    "none": 0.0,
    "selective": 0.5,
    "full": 1.0,
}  # share of the forward matmuls computed again


@dataclass(frozen=True)
class Tuning:
    """What measured runs of one software on one kind of machine need beyond the hardware: factors, 1 by
    default."""

    gemm: float = 1.0  # on matmul time
    fp8: float = 1.0  # on FP8 matmul time, besides
    pointwise: float = 1.0  # on memory-bound operators; code that is not compiled runs them one by one
    exposed_tp: float = 1.0  # share of TP's collectives that nothing hides
    attention: float = 1.0


HARDWARE = Tuning()
ASYNC_TP = 0.5
"""Share of TP's collectives left exposed by asynchronous tensor parallelism (PyTorch's, symmetric memory)."""


@dataclass(frozen=True)
class Step:
    """Seconds of one step by part, on the slowest stage."""

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
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_time(job: Job, layout: ParallelLayout, machine: Machine, tuning: Tuning = HARDWARE) -> Step:
    """Seconds of one step of a layout that divides (`layout.check`)."""
    config, micros = job.config, micro_batches(layout, job)
    middle, end = stage_layers(config.n_layers, layout.pp) or (config.n_layers, config.n_layers)
    rows, keys = layout.micro * job.context // layout.cp, job.context / 2
    frozen = job.adapters is not None
    cached = layout.micro * job.context
    block = _block(config, rows, keys, cached, layout.tp, layout.precision, frozen, machine.device, tuning)
    if frozen and job.frozen_bytes < WEIGHT:
        block = block.plus(_unpack(config, layout.tp, job.frozen_bytes, machine.device))
    head = _head(config, rows, layout.tp, frozen, machine.device, tuning)
    stages = (
        [block.times(end).plus(head)]
        if layout.pp == 1
        else [block.times(middle), block.times(end).plus(head)]
    )
    whole = max(stages, key=lambda stage: stage.total).times(micros)
    again = RECOMPUTED[layout.recompute]
    recompute = (
        again * whole.forward_gemm + (whole.forward_attention if again == 1 else 0) + again * whole.memory / 3
    )
    tp = micros * middle * _tp_seconds(config, rows, layout, machine, tuning, again == 1)
    cp = micros * middle * _cp_seconds(config, job.context * layout.micro, layout, machine)
    pp = micros * _pp_seconds(config, rows, layout, machine)
    busy = whole.total + recompute + tp + cp + pp
    bubble = busy * (layout.pp - 1) / (layout.chunks * micros)
    dp = _dp_seconds(job, layout, machine, micros, whole.total + recompute)
    return Step(
        gemm=whole.gemm,
        attention=whole.attention,
        memory=whole.memory,
        recompute=recompute,
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        optimizer=_optimizer_seconds(job, layout, machine.device),
        bubble=bubble,
    )


def mfu(job: Job, machine: Machine, seconds: float) -> float:
    """Model FLOPs a second, as a share of the bf16 peak of the data sheet."""
    return job.flops / seconds / (machine.count * machine.device.peak("bf16"))


class _Busy(NamedTuple):
    """Seconds of compute by kind."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    forward_gemm: float = 0.0
    forward_attention: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory

    def times(self, factor: float) -> _Busy:
        return _Busy(*(factor * value for value in self))

    def plus(self, other: _Busy) -> _Busy:
        return _Busy(*(a + b for a, b in zip(self, other, strict=True)))


@functools.lru_cache(maxsize=8192)
def _block(
    config: ModelConfig,
    rows: int,
    keys: float,
    cached: int,
    tp: int,
    precision: str,
    frozen: bool,
    device: Device,
    tuning: Tuning,
) -> _Busy:
    """Forward and backward of one block."""
    weights = {"fp8": FP8, "fp32": FP32}.get(precision, BF16)
    ops = layer_ops(config, rows, keys, cached, weights=weights, tp=tp, split_rows=True)
    return _busy(ops, frozen, device, tuning)


@functools.lru_cache(maxsize=1024)
def _head(config: ModelConfig, rows: int, tp: int, frozen: bool, device: Device, tuning: Tuning) -> _Busy:
    return _busy(head_ops(config, rows, tp=tp), frozen, device, tuning)


def _busy(ops: list[Op], frozen: bool, device: Device, tuning: Tuning) -> _Busy:
    """Forward and backward; frozen weights have no gradient, only what flows through them."""
    gemm = attention = memory = forward_gemm = forward_attention = 0.0
    for op in ops:
        if op.kind == "gemm":
            params = op.flops / 2 / op.rows
            inner_outer = (op.nbytes - params) / 2 / op.rows  # values a row read and written
            factor = tuning.gemm * (tuning.fp8 if op.dtype == "fp8" else 1.0)
            once = cost(op, device).seconds * factor
            add = cost(Op("add to fp32", "memory", 0.0, 2 * MASTER * params), device).memory
            forward_gemm += once
            gemm += (2 if frozen else 3) * once
            memory += 0.0 if frozen else add * tuning.pointwise
            if (
                op.dtype == "fp8"
            ):  # forward x and w, backward dy twice over: read 2 bytes, write 1, and its transpose
                cast = 3 * (2 * op.rows * inner_outer + 2 * params)
                memory += cost(Op("cast", "memory", 0.0, cast), device).seconds * tuning.pointwise
        elif op.kind == "attention":
            forward_attention = cost(op, device).seconds * tuning.attention
            backward = replace(
                op,
                kind="attention_backward",
                flops=ATTENTION_BACKWARD * op.flops,
                nbytes=ATTENTION_BACKWARD * op.nbytes,
            )
            attention += forward_attention + cost(backward, device).seconds * tuning.attention
        else:
            memory += 3 * cost(op, device).seconds * tuning.pointwise
    return _Busy(gemm, attention, memory, forward_gemm, forward_attention)


@functools.lru_cache(maxsize=256)
def _unpack(config: ModelConfig, tp: int, width: float, device: Device) -> _Busy:
    """Frozen weights of fewer bits are unpacked to bf16 before each of their two uses."""
    params = stage_params(config.replace(tie_embeddings=True), 1) - config.vocab_size * config.dim
    op = Op("unpack", "memory", 0.0, params / tp / config.n_layers * (width + WEIGHT))
    return _Busy(memory=2 * cost(op, device).seconds)


def _tp_seconds(
    config: ModelConfig, rows: int, layout: ParallelLayout, machine: Machine, tuning: Tuning, recompute: bool
) -> float:
    """Exposed seconds of one block's collectives over TP, forward and backward."""
    if layout.tp == 1:
        return 0.0
    collectives = 4 + 6 + (2 if recompute else 0)
    exposed = tuning.exposed_tp * (ASYNC_TP if layout.async_tp else 1.0)
    return exposed * collectives * all_gather(WEIGHT * rows * config.dim, layout.tp, machine.join(layout.tp))


def _cp_seconds(config: ModelConfig, tokens: int, layout: ParallelLayout, machine: Machine) -> float:
    """One block's K and V of all ``tokens``: gathered forward, gathered again and scattered (fp32)
    backward."""
    if layout.cp == 1:
        return 0.0
    link = machine.join(layout.cp, layout.tp)
    nbytes = 2 * tokens * max(config.n_kv_heads // layout.tp, 1) * config.head_dim
    return all_gather(WEIGHT * nbytes, layout.cp, link) * 2 + all_gather(MASTER * nbytes, layout.cp, link)


def _pp_seconds(config: ModelConfig, rows: int, layout: ParallelLayout, machine: Machine) -> float:
    """One micro-batch's rows to the next stage and their gradients back. Interleaved schedules send beside
    the compute, for what they send is not needed at once; what remains is the beginning of a transfer."""
    if layout.pp == 1:
        return 0.0
    link = machine.join(2, layout.tp * layout.cp)
    each = send(WEIGHT * rows * config.dim / layout.tp, link)
    return 2 * layout.chunks * (each * CONTENTION if layout.chunks > 1 else each)


def _dp_seconds(job: Job, layout: ParallelLayout, machine: Machine, micros: int, compute: float) -> float:
    """What gathering weights and scattering gradients adds to a step in which the chip computes for
    ``compute``."""
    ranks = layout.sharers
    if layout.dp * layout.cp == 1:
        return 0.0
    link = _join_dp(layout, machine, ranks)
    params = stage_params(job.config, layout.pp) / layout.tp
    trained = params if job.adapters is None else job.adapters / layout.tp / layout.pp
    width = WEIGHT if job.adapters is None else job.frozen_bytes
    gather, scatter = all_gather(width * params, ranks, link), all_gather(MASTER * trained, ranks, link)
    if job.adapters is not None and layout.shard != "all":
        gather = 0.0  # every rank has the frozen weights
    if layout.shard == "all":
        total = micros * (2 * gather + scatter)
    else:
        rounds = max(1, micros // layout.pp) if layout.shard == "gradients" and layout.pp > 1 else 1
        total = gather + scatter * (rounds if layout.shard == "gradients" else 1)
    if layout.replicas > 1:
        between = machine.join(layout.replicas, layout.tp * ranks * layout.pp)
        total += all_reduce(MASTER * trained / ranks, layout.replicas, between)
    hidden = min(total, compute)
    return total - hidden + CONTENTION * hidden


def _join_dp(layout: ParallelLayout, machine: Machine, ranks: int) -> Link:
    """CP and DP together shard the states: their ranks stand TP, and with pipelines also PP, apart."""
    if layout.pp == 1:
        return machine.join(ranks, layout.tp)
    return machine.join(max(1, ranks // layout.cp), layout.tp * layout.cp * layout.pp)


def _optimizer_seconds(job: Job, layout: ParallelLayout, device: Device) -> float:
    """Adam reads weight, gradient and both moments, writes weight, moments and the bf16 copy; clipping reads
    once more."""
    trained = stage_params(job.config, layout.pp) if job.adapters is None else job.adapters / layout.pp
    params = trained / layout.tp / layout.sharers
    return cost(Op("adam", "memory", 0.0, params * (5 * MASTER + 3 * MASTER + WEIGHT)), device).seconds


def predict(job: Job, layout: ParallelLayout, machine: Machine, tuning: Tuning = HARDWARE) -> Step:
    """`step_time` of a layout that is checked first. PlanError where it does not divide."""
    check(layout, job)
    return step_time(job, layout, machine, tuning)
