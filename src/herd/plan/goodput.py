"""The fraction of a long run that is useful training, given failures, checkpoints and restarts.

With a mean time M between failures, a checkpoint of C seconds every τ seconds, and R seconds from a failure
until training continues,

    effective = 1 / ((1 + C / τ) · (1 + (R + τ / 2) / M))        best τ ≈ sqrt(2 · C · M)

(Young 1974, Daly 2006). One device fails once in `HOURS_PER_FAILURE` hours, and the failures of many devices
add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
"""Device hours between interruptions (50,676). Llama 3 had 419 in 54 days on 16,384 GPUs (table 5)."""
STORE_RATE = 2e12 / 16_384
"""Bytes/s per device to storage. Llama 3's storage sustained 2 TB/s for 16,384 devices (section 3.3.1)."""
RESTART = 600.0
"""Seconds from a failure until training continues: detect, replace, load, start.

No figure is published. bench/plan_published.py shows the effect of other values.
"""


@dataclass(frozen=True)
class Goodput:
    """Time between failures and checkpoints of a run, and the fraction of useful training."""

    between_failures: float  # seconds
    checkpoint_seconds: float
    interval: float  # seconds between checkpoints
    effective: float  # fraction of the time that is useful training


def young_daly(devices: int, checkpoint_bytes: float, *, restart: float = RESTART) -> Goodput:
    """Return the best checkpoint interval and its fraction of useful training. ``restart`` is in seconds."""
    between = HOURS_PER_FAILURE * 3600 / devices
    write = checkpoint_bytes / (STORE_RATE * devices)
    interval = max(math.sqrt(2 * write * between), write)
    effective = 1 / ((1 + write / interval) * (1 + (restart + interval / 2) / between))
    return Goodput(between, write, interval, effective)
