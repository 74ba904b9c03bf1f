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


RULER = (
    "multikey", "multivalue", "distractors", "variables", "common_words", "frequent_words", "questions"
)  # fmt: skip

# The shots of Azure's published table (and of the leaked one).
TASKS: dict[str, Known] = {
    "boolq": Known(choice.BoolQ, 5),
    "gsm8k": Known(Gsm8k, 8),
    "hellaswag": Known(choice.HellaSwag, 5),
    "human_eval": Known(HumanEval, 0),
    **{f"mmlu_{group}": Known(Mmlu.of, 5) for group in SUBJECTS},
    "openbookqa": Known(choice.OpenBookQA, 10),
    "piqa": Known(choice.Piqa, 5),
    "social_iqa": Known(choice.SocialIqa, 5),
    "truthfulqa_mc1": Known(choice.TruthfulQaMc1, 6),
    "winogrande": Known(choice.Winogrande, 5),
    "arc_challenge": Known(choice.Arc, 25),
    "arc_easy": Known(choice.Arc, 25),
    "mbpp": Known(Mbpp, 3),
    "mgsm": Known(Mgsm, 8),
    "ifeval": Known(IfEval),
    "bfcl": Known(Bfcl),
    "tool_calls": Known(ToolDialogs),
    "tool_answers": Known(ToolDialogs),
    "bpb_sentences": Known(Sentences),
    "bpb_declaration": Known(Declaration),
    "needle_single": Known(LongText),
    "needle_multi": Known(LongText),
    **{f"ruler_{kind}": Known(LongText) for kind in RULER},
    **{f"mmlu_{subject}": Known(Mmlu.of, 5) for subjects in SUBJECTS.values() for subject in subjects},
}

_MMLU = tuple(Entry(f"mmlu_{group}") for group in SUBJECTS)

SUITES: dict[str, tuple[Entry, ...]] = {
    # Azure's thirteen: as published, whatever the model is
    "leak": (
        Entry("boolq"), Entry("gsm8k"), Entry("hellaswag"), Entry("human_eval"), *_MMLU, Entry("openbookqa"),
        Entry("piqa"), Entry("social_iqa"), Entry("truthfulqa_mc1"), Entry("winogrande"),
    ),
    # Llama 3.1's model card and paper (tables 9 to 14), with their shots, as far as the data sets are here
    "base": (
        *_MMLU, Entry("winogrande", 5), Entry("arc_challenge", 25), Entry("boolq", 0), Entry("human_eval", 0),
        Entry("mbpp", 3), Entry("gsm8k", 8), Entry("piqa", 0), Entry("social_iqa", 0), Entry("openbookqa", 0),
    ),
    "instruct": (
        *_MMLU, Entry("arc_challenge", 0), Entry("human_eval", 0), Entry("mbpp", 0), Entry("gsm8k", 8),
        Entry("mgsm", 0), Entry("ifeval"), Entry("bfcl"),
    ),
    # which function, with which arguments; and Herd's own forms of asking
    "tools": (Entry("bfcl"), Entry("tool_calls"), Entry("tool_answers")),
    "multilingual": (Entry("mgsm"), Entry("bpb_sentences"), Entry("bpb_declaration")),
    # one thing and several by length and depth; then RULER's kinds
    "long": (Entry("needle_single"), Entry("needle_multi"), *(Entry(f"ruler_{kind}") for kind in RULER)),
}  # fmt: skip


def make(name: str, shots: int | None = None, mode: Mode = "base") -> Task:
    """A task by name, ``lm-eval:NAME`` for lm-eval's own. DataError naming the nearest ones for an unknown name."""
    if name.startswith(PREFIX):
        return LmEvalTask.of(name.removeprefix(PREFIX), shots, mode)
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
