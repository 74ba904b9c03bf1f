"""The plan of a training run: the fastest layout that fits, then days, dollars and what failures leave of
them.

Three kinds of run share it: pre-training (every parameter learns), fine-tuning (all, or adapters beside a
frozen model), distillation (a teacher's targets besides, made beforehand and kept on disk)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..llama.config import SIZES, ModelConfig
from ..quant.formats import Q4_0
from ..train.memory import state_nbytes
from .goodput import Goodput, young_daly
from .layout import Job, ParallelLayout, check
from .machines import Machine
from .memory import rank_nbytes, usable
from .money import Money, money
from .ops import forward_ops, tp_seconds
from .roofline import seconds
from .search import Found, Search, evaluate, search
from .step import HARDWARE, Tuning

CACHE_BYTES = 60
"""Bytes a token of a teacher's sampled targets takes: ids, counts, probabilities and entropy (arXiv
2503.16870)."""
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Teacher:
    """A teacher's forward passes over all tokens, made before the student's training: on how many replicas,
    with how many ranks of tensor parallelism each, hours, and bytes of the targets on disk."""

    config: ModelConfig
    tp: int
    replicas: int
    hours: float
    cache_bytes: float


@dataclass(frozen=True)
class TrainPlan:
    """A run on a machine: the chosen layout, the runners-up, time, money."""

    job: Job
    machine: Machine
    tokens: float
    best: Found
    others: tuple[Found, ...]  # best of other TP × CP × PP × DP, fastest first
    feasible: int
    seen: int
    steps: float
    busy_hours: float  # if nothing ever failed
    hours: float
    goodput: Goodput
    money: Money
    teacher: Teacher | None = None

    @property
    def days(self) -> float:
        return self.hours / 24

    @property
    def device_hours(self) -> float:
        return self.hours * self.machine.count


def size(name: str) -> ModelConfig:
    """A published model by name. PlanError listing them."""
    found = {known.lower(): config for known, config in SIZES.items()}.get(name.strip().lower())
    if found is None:
        raise PlanError(f"size {name!r} is not one of {', '.join(SIZES)}")
    return found


def default_batch(config: ModelConfig, context: int, devices: int) -> int:
    """Sequences a step: 16 M tokens for the largest model, 4 M for the smallest (Llama 3 paper, 3.4.1), in a
    number that spreads over the devices."""
    tokens = 16 * 2**20 if config.n_params > 5e10 else 4 * 2**20
    odd = devices // (devices & -devices)
    wanted = max(1, tokens // context)
    return max(1, round(wanted / odd)) * odd


def adapter_params(config: ModelConfig, rank: int) -> int:
    """Parameters of low-rank adapters on every matrix of every block."""
    if rank < 1:
        raise PlanError(f"rank={rank}: give at least 1")
    return sum(rank * sum(shape) for name, shape in config.param_shapes() if "proj" in name)


def finetune_job(config: ModelConfig, batch: int, context: int, method: str, rank: int = 16) -> Job:
    """``full``: every parameter; ``lora``: adapters beside bf16 weights; ``qlora``: beside 4-bit weights."""
    if method not in METHODS:
        raise PlanError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if method == "full":
        return Job(config, batch, context)
    width = 2.0 if method == "lora" else Q4_0.bits / 8
    return Job(config, batch, context, adapters=adapter_params(config, rank), frozen_bytes=width)


def plan(
    job: Job,
    machine: Machine,
    tokens: float,
    *,
    precision: str = "bf16",
    fixed: ParallelLayout | None = None,
    usd_per_hour: float | None = None,
    restart: float | None = None,
    teacher: Teacher | None = None,
    tuning: Tuning = HARDWARE,
) -> TrainPlan:
    """The fastest layout and what it comes to; with ``fixed``, that layout. A teacher's hours come before the
    run's. PlanError where nothing fits, saying what would."""
    if precision == "fp8" and not machine.device.has("fp8"):
        raise PlanError(f"{machine.device.name} has no FP8: use --precision bf16")
    if fixed is None:
        result = search(job, machine, precision=precision, tuning=tuning)
        if not result.found:
            raise PlanError(_too_big(job, machine, result, precision))
    else:
        result = _just(job, fixed, machine, tuning)
    best = result.best
    steps = tokens / job.tokens
    busy = steps * best.seconds / 3600 + (teacher.hours if teacher else 0.0)
    state = state_nbytes(job.config) if job.adapters is None else 12.0 * job.adapters
    good = young_daly(machine.count, state, **({} if restart is None else {"restart": restart}))
    hours = busy / good.effective
    return TrainPlan(
        job=job,
        machine=machine,
        tokens=tokens,
        best=best,
        others=tuple(result.by_shape()[1:]),
        feasible=len(result.found),
        seen=result.seen,
        steps=steps,
        busy_hours=busy,
        hours=hours,
        goodput=good,
        money=money(machine, hours, usd_per_hour),
        teacher=teacher,
    )


def _just(job: Job, layout: ParallelLayout, machine: Machine, tuning: Tuning) -> Search:
    """A layout that was asked for, nothing else. PlanError where it does not divide or fit."""
    if layout.devices != machine.count:
        raise PlanError(
            f"{layout} is {layout.devices:,} devices, the machine has {machine.count:,}: make the product equal"
        )
    if layout.tp > machine.per_node:
        raise PlanError(
            f"tp={layout.tp} is more than the {machine.per_node} devices of a node: use at most that many"
        )
    check(layout, job)
    nbytes = rank_nbytes(job, layout)
    room = usable(machine.device.memory)
    if nbytes.total > room:
        worst = max(nbytes.parts(), key=lambda part: nbytes.parts()[part])
        raise PlanError(
            f"{layout} needs {nbytes.total / 1e9:,.1f} GB a device of {room / 1e9:,.1f} on {machine.device.name}; "
            f"its {worst} need most: {_CURES[worst]}"
        )
    return Search([evaluate(job, layout, machine, tuning, nbytes)], seen=1)


_CURES = {
    "weights": "raise tp or pp",
    "gradients": "raise tp or pp, or shard gradients",
    "optimizer": "raise dp, tp or pp",
    "activations": "recompute, raise tp or cp, or lower micro",
    "loss": "lower micro or raise cp",
    "buffers": "lower micro or raise cp",
}


def _too_big(job: Job, machine: Machine, result: Search, precision: str) -> str:
    """Why nothing fits, and the smallest change that makes it fit."""
    room = usable(machine.device.memory)
    said = (
        f"{job.config.n_params / 1e9:.4g}B parameters at context {job.context:,} do not fit {machine.name}: the least "
        f"layout needs {result.least / 1e9:,.1f} GB a device of {room / 1e9:,.1f} to use"
    )
    count = machine.count
    while count < 1 << 20:
        count *= 2
        more = replace(job, batch=max(job.batch, count))
        if search(more, machine.of(count), precision=precision).found:
            return f"{said}; {machine.of(count).name} would do"
    return f"{said}; use a smaller model, a shorter context or adapters"


def label(teacher: ModelConfig, machine: Machine, tokens: float, context: int) -> Teacher:
    """Labelling with a teacher on the whole machine. PlanError where its weights do not fit."""
    room, held = usable(machine.device.memory), teacher.nbytes(2.0)
    spread = 1 << max(0, math.ceil(math.log2(held / (0.9 * room))))
    tp = min(spread, machine.per_node)
    if spread > machine.count or teacher.n_heads % tp:
        raise PlanError(
            f"a teacher of {teacher.n_params / 1e9:.4g}B parameters takes {held / 1e9:,.0f} GB in bf16, {machine.name} "
            f"has {machine.memory / 1e9:,.0f}: use {machine.of(spread).name}, or a smaller teacher"
        )
    rows = context * 8
    ops = forward_ops(teacher, rows, context / 2, rows, tp=tp)
    each = seconds(ops, machine.device) + tp_seconds(teacher, rows, tp, machine.join(tp))
    replicas = machine.count // spread
    stages = (
        spread // tp
    )  # beyond a node its layers are divided, and a steady stream of batches keeps all stages busy
    return Teacher(
        teacher, tp, replicas, tokens / rows * each / (replicas * stages) / 3600, CACHE_BYTES * tokens
    )
