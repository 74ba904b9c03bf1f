"""How much of a long run is training: failures, checkpoints, restarts.

With a mean time M between failures, a checkpoint of C seconds every τ, and R seconds until training goes on
after one,

    effective = 1 / ((1 + C / τ) · (1 + (R + τ / 2) / M))        best τ ≈ sqrt(2 · C · M)       (Young 1974,
    Daly 2006)

One device fails once in `HOURS_PER_FAILURE`: Llama 3 saw 419 unexpected interruptions in 54 days on 16,384
GPUs (paper, table 5), and failures of many devices add up. `simulate` plays such a run through, interruption
by interruption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import PlanError

HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
"""Device hours between unexpected interruptions: 50,676."""
STORE_RATE = 2e12 / 16_384
"""Bytes/s a device writes to storage: Llama 3's Tectonic, 2 TB/s sustained for 16,384 (paper, 3.3.1)."""
RESTART = 600.0
"""Seconds from a failure until training goes on: detect, replace, load, begin. Not published; see
`simulate`."""


@dataclass(frozen=True)
class Goodput:
    """What failures and checkpoints leave of a run."""

    between_failures: float  # seconds
    checkpoint_seconds: float
    interval: float  # seconds between checkpoints
    effective: float  # share of the time that is training which counts


def young_daly(
    devices: int,
    checkpoint_bytes: float,
    *,
    restart: float = RESTART,
    hours_per_failure: float = HOURS_PER_FAILURE,
) -> Goodput:
    """The best checkpoint interval and what is left with it."""
    if restart < 0 or hours_per_failure <= 0:
        raise PlanError(
            f"restart={restart} s and {hours_per_failure} h between failures: give positive times"
        )
    between = hours_per_failure * 3600 / devices
    write = checkpoint_bytes / (STORE_RATE * devices)
    interval = max(math.sqrt(2 * write * between), write)
    effective = 1 / ((1 + write / interval) * (1 + (restart + interval / 2) / between))
    return Goodput(between, write, interval, effective)
