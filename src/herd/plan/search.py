"""The fastest layouts of a training job on a machine: all that divide and fit, in order of their step time.

Small enough to look at every one: powers of two for TP and CP, every PP that comes out even, DP what is left;
for each the micro-batch sizes, pieces a stage, what is recomputed and what is sharded. What does not fit the
memory is counted by what it lacks, so that "no" can say why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import PlanError
from .layout import RECOMPUTES, SHARDS, Job, ParallelLayout, Recompute, micro_batches, stage_layers
from .machines import Machine
from .memory import RankBytes, rank_nbytes, usable
from .step import HARDWARE, Step, Tuning, mfu, step_time

MICROS = (1, 2, 4, 8, 16)
SHORTEST = 2048
"""Tokens of a sequence that a rank has at least: below, there is too little between two collectives."""


@dataclass(frozen=True)
class Found:
    """A layout with what it takes."""

    layout: ParallelLayout
    step: Step
    nbytes: RankBytes
    mfu: float
    tokens_per_s: float

    @property
    def seconds(self) -> float:
        return self.step.seconds


@dataclass
class Search:
    """What a search saw: layouts that fit, fastest first; how many were too big and the least bytes among
    them."""

    found: list[Found] = field(default_factory=list)
    seen: int = 0
    too_big: int = 0
    least: float = math.inf
    least_layout: ParallelLayout | None = None

    @property
    def best(self) -> Found:
        return self.found[0]

    def by_shape(self) -> list[Found]:
        """The best of each TP × CP × PP × DP."""
        best: dict[tuple[int, int, int, int], Found] = {}
        for found in self.found:
            best.setdefault(found.layout.shape, found)
        return list(best.values())


def search(
    job: Job,
    machine: Machine,
    *,
    precision: str = "bf16",
    tuning: Tuning = HARDWARE,
    async_tp: bool = False,
    recomputes: Sequence[Recompute] = RECOMPUTES,
) -> Search:
    """All layouts of ``machine.count`` devices that divide, those that fit in order of step time. PlanError
    where none divides; an empty ``found`` where none fits."""
    result, room = Search(), usable(machine.device.memory)
    for layout in layouts(job, machine, precision, async_tp, recomputes):
        result.seen += 1
        nbytes = rank_nbytes(job, layout)
        if nbytes.total > room:
            result.too_big += 1
            if nbytes.total < result.least:
                result.least, result.least_layout = nbytes.total, layout
            continue
        result.found.append(evaluate(job, layout, machine, tuning, nbytes))
    if not result.seen:
        odd = machine.count // (machine.count & -machine.count)
        raise PlanError(
            f"a batch of {job.batch:,} sequences does not spread over {machine.count:,} devices: use a batch of "
            f"{-(-job.batch // odd) * odd:,}, or a number of devices that is a power of two"
        )
    result.found.sort(key=lambda found: found.seconds)
    return result


def evaluate(
    job: Job,
    layout: ParallelLayout,
    machine: Machine,
    tuning: Tuning = HARDWARE,
    nbytes: RankBytes | None = None,
) -> Found:
    """One layout that divides, with what it takes."""
    step = step_time(job, layout, machine, tuning)
    seconds = step.seconds
    return Found(
        layout, step, nbytes or rank_nbytes(job, layout), mfu(job, machine, seconds), job.tokens / seconds
    )


def layouts(
    job: Job,
    machine: Machine,
    precision: str = "bf16",
    async_tp: bool = False,
    recomputes: Sequence[Recompute] = RECOMPUTES,
) -> Iterator[ParallelLayout]:
    """Every layout that uses all devices and divides the model and the batch."""
    config, count = job.config, machine.count
    for tp in _powers(min(machine.per_node, count)):
        if config.n_heads % tp or config.ffn_dim % tp or count % tp:
            continue
        for cp in _powers(count // tp):
            if (cp > 1 and job.context % (2 * cp)) or (count // tp) % cp:
                continue
            if job.context // cp < min(job.context, SHORTEST):
                continue
            for pp in range(1, min(config.n_layers, count // tp // cp) + 1):
                layers = stage_layers(config.n_layers, pp)
                if (count // tp // cp) % pp or layers is None:
                    continue
                dp = count // tp // cp // pp
                if job.batch % dp == 0:
                    yield from _variants(job, (tp, cp, pp, dp), layers[0], precision, async_tp, recomputes)


def _variants(
    job: Job,
    shape: tuple[int, int, int, int],
    layers: int,
    precision: str,
    async_tp: bool,
    recomputes: Sequence[Recompute],
) -> Iterator[ParallelLayout]:
    tp, cp, pp, dp = shape
    for micro in MICROS:
        if (job.batch // dp) % micro:
            continue
        for chunks in (1,) if pp == 1 else _divisors(layers):
            for recompute in recomputes:
                for shard in SHARDS if dp * cp > 1 else SHARDS[-1:]:
                    if pp > 1 and shard == "all":
                        continue  # weights gathered for every micro-batch of every piece: never worth it in a pipeline
                    layout = ParallelLayout(
                        tp, cp, pp, dp, micro, chunks, recompute, precision, shard, async_tp and tp > 1
                    )
                    if pp == 1 or micro_batches(layout, job) >= pp:
                        yield layout


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(max(limit, 1).bit_length())]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
