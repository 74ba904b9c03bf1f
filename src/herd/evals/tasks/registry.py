"""The tasks and suites that ``herd eval`` knows, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import DataError
from ...package_yaml import package_yaml
from . import choice
from .calls import Bfcl
from .dialogs import ToolDialogs
from .instructions import IfEval
from .lm_eval import PREFIX, LmEvalTask
from .long import LONG_TASKS, LongText
from .mmlu import SUBJECTS, Mmlu
from .parallel_text import Declaration, Sentences
from .programs import HumanEval, Mbpp
from .questions import OwnQuestions
from .task import Mode, Task
from .word_problems import Gsm8k, Mgsm


@dataclass(frozen=True)
class TaskEntry:
    """A task of a suite. ``shots`` defaults to the task's usual number."""

    task: str
    shots: int | None = None


@dataclass(frozen=True)
class TaskMaker:
    """The function ``make(name, shots, mode)`` that makes a task, and the task's usual number of shots."""

    make: Callable[[str, int, Mode], Task]
    shots: int = 0


TASKS: dict[str, TaskMaker] = {  # with the shots of Azure's published table
    "boolq": TaskMaker(choice.BoolQ, 5),
    "gsm8k": TaskMaker(Gsm8k, 8),
    "hellaswag": TaskMaker(choice.HellaSwag, 5),
    "human_eval": TaskMaker(HumanEval, 0),
    **{f"mmlu_{group}": TaskMaker(Mmlu.of, 5) for group in SUBJECTS},
    "openbookqa": TaskMaker(choice.OpenBookQA, 10),
    "piqa": TaskMaker(choice.Piqa, 5),
    "social_iqa": TaskMaker(choice.SocialIqa, 5),
    "truthfulqa_mc1": TaskMaker(choice.TruthfulQaMc1, 6),
    "winogrande": TaskMaker(choice.Winogrande, 5),
    "arc_challenge": TaskMaker(choice.Arc, 25),
    "arc_easy": TaskMaker(choice.Arc, 25),
    "mbpp": TaskMaker(Mbpp, 3),
    "mgsm": TaskMaker(Mgsm, 8),
    "ifeval": TaskMaker(IfEval),
    "bfcl": TaskMaker(Bfcl),
    "tool_calls": TaskMaker(ToolDialogs),
    "tool_answers": TaskMaker(ToolDialogs),
    "bpb_sentences": TaskMaker(Sentences),
    "bpb_declaration": TaskMaker(Declaration),
    **{name: TaskMaker(LongText) for name in LONG_TASKS},
    **{f"mmlu_{subject}": TaskMaker(Mmlu.of, 5) for subjects in SUBJECTS.values() for subject in subjects},
}


def _entry(text: str) -> TaskEntry:
    name, _, shots = text.partition(":")
    return TaskEntry(name, int(shots) if shots else None)


_SUITES = package_yaml(__package__, "suites.yaml")
SUITES = {name: tuple(map(_entry, tasks.split())) for name, tasks in _SUITES.items()}


def make_task(name: str, shots: int | None = None, mode: Mode = "base") -> Task:
    """Return a task by name. ``lm-eval:NAME`` is a task of lm-eval, and a path is a file of own questions.

    Raises `DataError` with similar names if it is unknown.
    """
    if name.startswith(PREFIX):
        return LmEvalTask.of(name.removeprefix(PREFIX), shots, mode)
    if "." in name or "/" in name:
        return OwnQuestions.of(name, shots, mode)
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}: {_nearest(name, TASKS)}")
    known = TASKS[name]
    return known.make(name, known.shots if shots is None else shots, mode)


def suite_entries(name: str) -> tuple[TaskEntry, ...]:
    """Return the tasks of a suite. Raises `DataError` with similar names if the suite is unknown."""
    name = {"leak": "llama31"}.get(name, name)  # its name before
    if name not in SUITES:
        raise DataError(f"unknown suite {name!r}: {_nearest(name, SUITES)}")
    return SUITES[name]


def _nearest(name: str, names: dict) -> str:
    near: Sequence[str] = difflib.get_close_matches(name, names, 3, 0.5) or sorted(names)
    return f"did you mean {' or '.join(near)}?" if len(near) <= 3 else f"the names are {', '.join(near)}"
