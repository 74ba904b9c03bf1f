"""From a teacher to a student that fits: importance scores and structured pruning.

Distillation itself is `herd.train` with the `distil` objective; there is no second trainer.
"""

from .importance import Importance, best_block, importance
from .prune import PruneMask, prune

__all__ = ["Importance", "PruneMask", "best_block", "importance", "prune"]
