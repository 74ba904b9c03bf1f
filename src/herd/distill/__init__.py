"""Make a smaller student of a teacher by importance scores and structured pruning.

Distillation itself is `herd.train` with the `distil` objective.
"""

from .importance import Importance, best_block, importance
from .prune import prune

__all__ = ["Importance", "best_block", "importance", "prune"]
