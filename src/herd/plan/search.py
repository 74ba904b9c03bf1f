"""Find the fastest parallel layouts of a training job among all that divide the job and fit in memory.

The space is small enough to try every layout: powers of two for TP and CP, every PP that divides evenly, and
DP as the remaining factor. For each of them all micro-batch sizes, chunks per stage, recomputation and
sharding are tried. The smallest memory of the layouts that do not fit is recorded, so that an error can say
how much memory is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import PlanError
from .layout import RECOMPUTES, SHARDS, Job, ParallelLayout, Recompute, micro_batches, stage_layers
from .machines import Machine
from .memory import RankBytes, rank_nbytes, usable_memory
from .step import Step, model_flops_utilization, step_time

MICROS = (1, 2, 4, 8, 16)
SHORTEST = 2048
"""Fewest tokens of a sequence per rank. With fewer, there is too little work between two collectives."""


@dataclass(frozen=True)
class SearchResult:
    """A layout with its time, memory and utilization."""

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
    """All layouts that fit, fastest first, the number tried, and the fewest bytes of the layouts too big."""

    found: list[SearchResult] = field(default_factory=list)
    seen: int = 0
    least: float = math.inf

    @property
    def best(self) -> SearchResult:
        return self.found[0]

    def by_shape(self) -> list[SearchResult]:
        """Return the best result of each TP × CP × PP × DP."""
        best: dict[tuple[int, int, int, int], SearchResult] = {}
        for found in self.found:
            best.setdefault(found.layout.shape, found)
        return list(best.values())


def search(
    job: Job, machine: Machine, *, precision: str = "bf16", recomputes: Sequence[Recompute] = RECOMPUTES
) -> Search:
    """Try all layouts of ``machine.count`` devices.

    ``found`` is empty if none fits. Raises `PlanError` if no layout divides the job.
    """
    result, room = Search(), usable_memory(machine.device.memory)
    for layout in layouts(job, machine, precision, recomputes):
        result.seen += 1
        nbytes = rank_nbytes(job, layout)
        if nbytes.total > room:
            result.least = min(result.least, nbytes.total)
        else:
            result.found.append(evaluate_layout(job, layout, machine, nbytes))
    if not result.seen:
        odd = odd_factor(machine.count)
        raise PlanError(
            f"a batch of {job.batch:,} sequences does not divide over {machine.count:,} devices: use a batch "
            f"of {-(-job.batch // odd) * odd:,}, or a number of devices that is a power of two"
        )
    result.found.sort(key=lambda found: found.seconds)
    return result


def evaluate_layout(job: Job, layout: ParallelLayout, machine: Machine, nbytes: RankBytes) -> SearchResult:
    """Return the time and utilization of a layout that divides the job."""
    step = step_time(job, layout, machine)
    mfu = model_flops_utilization(job, machine, step.seconds)
    return SearchResult(layout, step, nbytes, mfu, job.tokens / step.seconds)


def layouts(
    job: Job, machine: Machine, precision: str = "bf16", recomputes: Sequence[Recompute] = RECOMPUTES
) -> Iterator[ParallelLayout]:
    """Yield every layout that uses all devices and divides the model and the batch."""
    config, count = job.config, machine.count
    for tp in _powers_of_two(min(machine.per_node, count)):
        if config.n_heads % tp or config.ffn_dim % tp or count % tp:
            continue
        for cp in _powers_of_two(count // tp):
            if (cp > 1 and job.context % (2 * cp)) or (count // tp) % cp:
                continue
            if job.context // cp < min(job.context, SHORTEST):
                continue
            rest = count // tp // cp
            for pp in range(1, min(config.n_layers, rest) + 1):
                layers = stage_layers(config.n_layers, pp)
                if rest % pp == 0 and layers is not None and job.batch % (rest // pp) == 0:
                    yield from _variants(job, (tp, cp, pp, rest // pp), layers[0], precision, recomputes)


def _variants(
    job: Job, shape: tuple[int, int, int, int], layers: int, precision: str, recomputes: Sequence[Recompute]
) -> Iterator[ParallelLayout]:
    _, cp, pp, dp = shape
    chunk_counts = [1] if pp == 1 else [chunks for chunks in range(1, layers + 1) if layers % chunks == 0]
    # With a single rank there is nothing to shard. In a pipeline FSDP is never worth it: it would gather the
    # weights for every micro-batch of every chunk.
    shards = SHARDS[-1:] if dp * cp == 1 else SHARDS[1:] if pp > 1 else SHARDS
    for micro, chunks, recompute, shard in itertools.product(MICROS, chunk_counts, recomputes, shards):
        if (job.batch // dp) % micro:
            continue
        layout = ParallelLayout(*shape, micro, chunks, recompute, precision, shard)
        if pp == 1 or micro_batches(layout, job) >= pp:
            yield layout


def odd_factor(number: int) -> int:
    """Return the largest odd divisor of ``number``."""
    return number // (number & -number)


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(max(limit, 1).bit_length())]
