"""Simulate a long training run with its interruptions, to check the formula in `herd.plan.goodput`."""

from __future__ import annotations

import random


def simulate_run(
    days: float,
    unexpected: int,
    planned: int,
    *,
    interval: float,
    checkpoint_seconds: float,
    restart: float,
    seed: int = 0,
) -> float:
    """Return the share of ``days`` that is useful training, with interruptions at random moments.

    An unexpected interruption costs the work since the last checkpoint and a restart. A planned one costs
    only a restart, because a checkpoint is written before it. A failure during a restart starts the restart
    again. ``interval`` (between checkpoints), ``checkpoint_seconds`` and ``restart`` are seconds.
    """
    rng = random.Random(seed)
    end = days * 86_400
    breaks = sorted((rng.uniform(0, end), index < unexpected) for index in range(unexpected + planned))
    useful, at, saved = 0.0, 0.0, 0.0  # saved: work since the last checkpoint
    for moment, lost in [*breaks, (end, False)]:
        running = max(0.0, moment - at)  # nothing while a restart is still under way
        cycle = interval + checkpoint_seconds
        whole, rest = divmod(running + saved, cycle)
        done = whole * interval + min(rest, interval)
        useful += whole * interval if lost else done
        saved = 0.0
        at = max(at, moment) if moment == end else moment + restart
    return useful / end
