"""Half a cosine from the peak to a fraction of it: Llama 3's schedule."""

from __future__ import annotations

import math
from typing import Literal

from ..section import Fraction
from .base import Schedule


class Cosine(Schedule):
    """Warm-up, half a cosine down to ``min_lr_ratio`` of the peak, decay to zero."""

    kind: Literal["cosine"] = "cosine"
    min_lr_ratio: Fraction = 0.1

    def middle(self, done: float, peak: float) -> float:
        low = self.min_lr_ratio
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
