"""Tasks and suites by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import DataError
from . import choice
from .calls import Bfcl
from .dialogs import ToolDialogs
from .instructions import IfEval
from .lm_eval import PREFIX, LmEvalTask
from .long import LongText
from .mmlu import SUBJECTS, Mmlu
from .parallel_text import Declaration, Sentences
from .programs import HumanEval, Mbpp
from .task import Mode, Task
from .word_problems import Gsm8k, Mgsm


@dataclass(frozen=True)
class TaskEntry:
    """A task as a suite runs it; ``shots`` None is the task's usual number, ``mode`` None what the model is."""

    task: str
    shots: int | None = None
    mode: Mode | None = None


@dataclass(frozen=True)
class TaskMaker:
    """How to make a task: ``make_task(name, shots, mode)``, and its usual number of shots."""

    make: Callable[[str, int, Mode], Task]
    shots: int = 0


RULER = (
    "multikey", "multivalue", "distractors", "variables", "common_words", "frequent_words", "questions"
)  # fmt: skip

# The shots of Azure's published table (and of the leaked one).
TASKS: dict[str, TaskMaker] = {
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
    "needle_single": TaskMaker(LongText),
    "needle_multi": TaskMaker(LongText),
    **{f"ruler_{kind}": TaskMaker(LongText) for kind in RULER},
    **{f"mmlu_{subject}": TaskMaker(Mmlu.of, 5) for subjects in SUBJECTS.values() for subject in subjects},
}

_MMLU = tuple(TaskEntry(f"mmlu_{group}") for group in SUBJECTS)

SUITES: dict[str, tuple[TaskEntry, ...]] = {
    # Azure's thirteen: as published, whatever the model is
    "leak": (
        TaskEntry("boolq"), TaskEntry("gsm8k"), TaskEntry("hellaswag"), TaskEntry("human_eval"), *_MMLU, TaskEntry("openbookqa"),
        TaskEntry("piqa"), TaskEntry("social_iqa"), TaskEntry("truthfulqa_mc1"), TaskEntry("winogrande"),
    ),
    # Llama 3.1's model card and paper (tables 9 to 14), with their shots, as far as the data sets are here
    "base": (
        *_MMLU, TaskEntry("winogrande", 5), TaskEntry("arc_challenge", 25), TaskEntry("boolq", 0), TaskEntry("human_eval", 0),
        TaskEntry("mbpp", 3), TaskEntry("gsm8k", 8), TaskEntry("piqa", 0), TaskEntry("social_iqa", 0), TaskEntry("openbookqa", 0),
    ),
    "instruct": (
        *_MMLU, TaskEntry("arc_challenge", 0), TaskEntry("human_eval", 0), TaskEntry("mbpp", 0), TaskEntry("gsm8k", 8),
        TaskEntry("mgsm", 0), TaskEntry("ifeval"), TaskEntry("bfcl"),
    ),
    # which function, with which arguments; and Herd's own forms of asking
    "tools": (TaskEntry("bfcl"), TaskEntry("tool_calls"), TaskEntry("tool_answers")),
    "multilingual": (TaskEntry("mgsm"), TaskEntry("bpb_sentences"), TaskEntry("bpb_declaration")),
    # one thing and several by length and depth; then RULER's kinds
    "long": (TaskEntry("needle_single"), TaskEntry("needle_multi"), *(TaskEntry(f"ruler_{kind}") for kind in RULER)),
}  # fmt: skip


def make_task(name: str, shots: int | None = None, mode: Mode = "base") -> Task:
    """A task by name, ``lm-eval:NAME`` for lm-eval's own. DataError naming the nearest ones for an unknown name."""
    if name.startswith(PREFIX):
        return LmEvalTask.of(name.removeprefix(PREFIX), shots, mode)
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}: {_nearest(name, TASKS)}")
    known = TASKS[name]
    return known.make(name, known.shots if shots is None else shots, mode)


def suite_entries(name: str) -> tuple[TaskEntry, ...]:
    """A suite's tasks. Raises DataError naming the nearest suites for an unknown name."""
    if name not in SUITES:
        raise DataError(f"unknown suite {name!r}: {_nearest(name, SUITES)}")
    return SUITES[name]


def _nearest(name: str, names: dict) -> str:
    near: Sequence[str] = difflib.get_close_matches(name, names, 3, 0.5) or sorted(names)
    return f"did you mean {' or '.join(near)}?" if len(near) <= 3 else f"there are {', '.join(near)}"
