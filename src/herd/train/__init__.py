"""Training: one loop for every objective, and a state that survives kill -9 without changing a bit.

`TrainConfig` with its optimizers and schedules, and the memory formulas, need no torch. `train` and the
objectives load it when they are first used. A recipe (`recipe.py`) names one class of `sources`,
`objectives`, `optimizers` and `schedules` each.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .optimizers import AdamW
from .schedules import Constant, Cosine

if TYPE_CHECKING:
    from .loop import train
    from .objectives import Loss, distil, lm, sft

_HOMES = {"train": "loop"} | dict.fromkeys(("Loss", "lm", "sft", "distil"), "objectives")

__all__ = ["AdamW", "Constant", "Cosine", "Loss", "TrainConfig", "distil", "lm", "sft", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
