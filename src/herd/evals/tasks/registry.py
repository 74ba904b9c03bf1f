"""Tasks and suites by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import DataError
from . import choice
from .task import Mode, Task


@dataclass(frozen=True)
class Entry:
    """A task as a suite runs it; ``shots`` None is the task's usual number, ``mode`` None what the model is."""

    task: str
    shots: int | None = None
    mode: Mode | None = None


@dataclass(frozen=True)
class Known:
    """How to make a task: ``make(name, shots, mode)``, and its usual number of shots."""

    make: Callable[[str, int, Mode], Task]
    shots: int = 0


# The shots of Azure's published table (and of the leaked one).
TASKS: dict[str, Known] = {
    "boolq": Known(choice.BoolQ, 5),
    "hellaswag": Known(choice.HellaSwag, 5),
    "openbookqa": Known(choice.OpenBookQA, 10),
    "piqa": Known(choice.Piqa, 5),
    "social_iqa": Known(choice.SocialIqa, 5),
    "truthfulqa_mc1": Known(choice.TruthfulQaMc1, 6),
    "winogrande": Known(choice.Winogrande, 5),
    "arc_challenge": Known(choice.Arc, 25),
    "arc_easy": Known(choice.Arc, 25),
}

SUITES: dict[str, tuple[Entry, ...]] = {}


def make(name: str, shots: int | None = None, mode: Mode = "base") -> Task:
    """A task by name. Raises DataError naming the nearest ones for an unknown name."""
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}: {_nearest(name, TASKS)}")
    known = TASKS[name]
    return known.make(name, known.shots if shots is None else shots, mode)


def suite(name: str) -> tuple[Entry, ...]:
    """A suite's tasks. Raises DataError naming the nearest suites for an unknown name."""
    if name not in SUITES:
        raise DataError(f"unknown suite {name!r}: {_nearest(name, SUITES)}")
    return SUITES[name]


def _nearest(name: str, names: dict) -> str:
    near: Sequence[str] = difflib.get_close_matches(name, names, 3, 0.5) or sorted(names)
    return f"did you mean {' or '.join(near)}?" if len(near) <= 3 else f"there are {', '.join(near)}"
