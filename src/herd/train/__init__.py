"""Training: one loop, objectives as functions, and a state that survives kill -9 without changing a bit.

`TrainConfig`, `learning_rate`, the memory formulas and recipes need no torch; `train` and the objectives load it when
first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .schedule import learning_rate

if TYPE_CHECKING:
    from .loop import TrainResult, train
    from .objectives import Loss, distil, lm, sft

_HOMES = {"train": "loop", "TrainResult": "loop", "Loss": "objectives"} | dict.fromkeys(
    ("lm", "sft", "distil"), "objectives"
)

__all__ = ["Loss", "TrainConfig", "TrainResult", "distil", "learning_rate", "lm", "sft", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
