"""The peak until the decay: warm-up, stable, decay (WSD, arXiv 2404.06395)."""

from __future__ import annotations

from typing import Literal

from .base import Schedule


class Constant(Schedule):
    """Warm-up, the peak, decay to zero."""

    kind: Literal["constant"] = "constant"

    def middle(self, done: float, peak: float) -> float:
        return peak
