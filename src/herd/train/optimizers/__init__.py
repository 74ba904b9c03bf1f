"""Optimizers, one per file.

A second one makes `AnyOptimizer` a union told apart by ``kind``, as in `schedules`.
"""

from .adamw import AdamW

AnyOptimizer = AdamW

__all__ = ["AdamW", "AnyOptimizer"]
