"""The plan of a training run: the fastest layout that fits, days, cost, and time lost to failures.

There are three kinds of runs: pre-training (all parameters are trained), fine-tuning (all parameters, or
adapters next to a frozen model) and distillation (in addition a teacher's targets, computed beforehand and
stored on disk).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .. import units
from ..errors import PlanError
from ..llama.config import ModelConfig
from ..quant.formats import Q4_0
from ..train.memory import state_nbytes
from .goodput import RESTART, Goodput, young_daly
from .layout import Job, ParallelLayout, check_layout
from .machines import Machine
from .memory import rank_nbytes, usable_memory
from .money import Money, run_cost
from .ops import forward_ops, tp_seconds
from .roofline import NO_LINK, total_seconds
from .search import Search, SearchResult, evaluate_layout, odd_factor, search

CACHE_BYTES = 60
"""Bytes per token of a teacher's sampled targets: ids, counts, probabilities, entropy (arXiv 2503.16870)."""
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Teacher:
    """A teacher's forward passes over all tokens, before the student's training.

    ``replicas`` copies of the teacher run with ``tp`` ranks of tensor parallelism each. The targets take
    ``cache_bytes`` on disk.
    """

    config: ModelConfig
    tp: int
    replicas: int
    hours: float
    cache_bytes: float


@dataclass(frozen=True)
class TrainPlan:
    """A run on a machine: the chosen layout, the runners-up, time and money."""

    job: Job
    machine: Machine
    tokens: float
    best: SearchResult
    others: tuple[SearchResult, ...]  # the best of other TP × CP × PP × DP, fastest first
    feasible: int
    seen: int
    steps: float
    busy_hours: float  # without failures
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


def default_batch(config: ModelConfig, context: int, devices: int) -> int:
    """Return the sequences per step: 16 M tokens for large models, 4 M for small ones (paper, 3.4.1).

    The number is adjusted so that it divides over the devices.
    """
    tokens = 16 * 2**20 if config.n_params > 5e10 else 4 * 2**20
    odd = odd_factor(devices)
    return max(1, round(max(1, tokens // context) / odd)) * odd


def adapter_params(config: ModelConfig, rank: int) -> int:
    """Return the number of parameters of low-rank adapters on every matrix of every layer."""
    return sum(rank * sum(shape) for name, shape in config.param_shapes() if name.endswith("proj.weight"))


def finetune_job(config: ModelConfig, batch: int, context: int, method: str, rank: int = 16) -> Job:
    """Return the job of fine-tuning with a method.

    ``full`` trains every parameter, ``lora`` trains adapters next to bf16 weights, ``qlora`` next to 4-bit
    weights.
    """
    if method not in METHODS:
        raise PlanError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if method == "full":
        return Job(config, batch, context)
    width = 2.0 if method == "lora" else Q4_0.bits / 8
    return Job(config, batch, context, adapters=adapter_params(config, rank), frozen_bytes=width)


def plan_training(
    job: Job,
    machine: Machine,
    tokens: float,
    *,
    precision: str = "bf16",
    fixed: ParallelLayout | None = None,
    usd_per_hour: float | None = None,
    restart: float = RESTART,
    teacher: Teacher | None = None,
) -> TrainPlan:
    """Return the plan with the fastest layout, or with the layout ``fixed``.

    A teacher's hours are added. Raises `PlanError` if nothing fits. The message says what would.
    """
    if precision == "fp8" and not machine.device.has("fp8"):
        raise PlanError(f"{machine.device.name} has no FP8: use --precision bf16")
    if fixed is None:
        result = search(job, machine, precision=precision)
        if not result.found:
            raise PlanError(_too_big(job, machine, result, precision))
    else:
        result = _only(job, fixed, machine)
    best = result.best
    steps = tokens / job.tokens
    busy = steps * best.seconds / 3600 + (teacher.hours if teacher else 0.0)
    state = state_nbytes(job.config) if job.adapters is None else 12.0 * job.adapters
    goodput = young_daly(machine.count, state, restart=restart)
    hours = busy / goodput.effective
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
        goodput=goodput,
        money=run_cost(machine, hours, usd_per_hour),
        teacher=teacher,
    )


def _only(job: Job, layout: ParallelLayout, machine: Machine) -> Search:
    """Return a search result with this one layout.

    Raises `PlanError` if it does not divide the job or fit.
    """
    if layout.devices != machine.count:
        raise PlanError(
            f"{layout} takes {layout.devices:,} devices, the machine has {machine.count:,}: make them equal"
        )
    if layout.tp > machine.per_node:
        raise PlanError(f"tp={layout.tp} exceeds the {machine.per_node} devices of a node: use a smaller tp")
    check_layout(layout, job)
    nbytes = rank_nbytes(job, layout)
    room = usable_memory(machine.device.memory)
    if nbytes.total > room:
        parts = nbytes.parts()
        largest = max(parts, key=lambda part: parts[part])
        raise PlanError(
            f"{layout} needs {units.nbytes(nbytes.total)} per device, but {machine.device.name} has "
            f"{units.nbytes(room)}; the largest part is {largest}: {_CURES[largest]}"
        )
    return Search([evaluate_layout(job, layout, machine, nbytes)], seen=1)


_CURES = {
    "weights": "raise tp or pp",
    "gradients": "raise tp or pp, or shard gradients",
    "optimizer": "raise dp, tp or pp",
    "activations": "recompute, raise tp or cp, or lower micro",
    "loss": "lower micro or raise cp",
    "buffers": "lower micro or raise cp",
}


def _too_big(job: Job, machine: Machine, result: Search, precision: str) -> str:
    """Return the reason why nothing fits, and the smallest change that makes it fit."""
    room = usable_memory(machine.device.memory)
    reason = (
        f"{units.si(job.config.n_params)} parameters at context {job.context:,} do not fit on "
        f"{machine.name}: the smallest layout needs {units.nbytes(result.least)} per device, "
        f"of which {units.nbytes(room)} are usable"
    )
    count = machine.count
    while count < 1 << 20 and machine.network != NO_LINK:
        count *= 2
        larger = machine.with_devices(count)
        if search(replace(job, batch=max(job.batch, count)), larger, precision=precision).found:
            return f"{reason}; {larger.name} would suffice"
    return f"{reason}; use a smaller model, a shorter context or adapters"


def label_with_teacher(teacher: ModelConfig, machine: Machine, tokens: float, context: int) -> Teacher:
    """Return the plan of labelling all tokens with a teacher.

    Raises `PlanError` if the teacher does not fit.
    """
    room, held = usable_memory(machine.device.memory), teacher.nbytes(2.0)
    # Nine tenths of the memory are for the weights, the rest is for activations.
    spread = 1 << max(0, math.ceil(math.log2(held / (0.9 * room))))
    tp = min(spread, machine.per_node)
    if spread > machine.count or teacher.n_heads % tp:
        raise PlanError(
            f"a teacher of {units.si(teacher.n_params)} parameters takes {units.nbytes(held)} in bf16, but "
            f"{machine.name} has {units.nbytes(machine.memory)}: use {machine.with_devices(spread).name}, "
            "or a smaller teacher"
        )
    rows = context * 8
    ops = forward_ops(teacher, rows, context / 2, rows, tp=tp)
    each = total_seconds(ops, machine.device) + tp_seconds(teacher, rows, tp, machine.join(tp))
    replicas = machine.count // spread
    # Beyond one node the layers are split into stages, and a steady stream of batches keeps all stages busy.
    stages = spread // tp
    hours = tokens / rows * each / (replicas * stages) / 3600
    return Teacher(teacher, tp, replicas, hours, CACHE_BYTES * tokens)
