"""The benchmarks, one file per kind. For a new one, subclass `Task` and add a line to `registry.TASKS`.

`task.py` is the interface: a `Task` makes `Item`s, each with one request (`Rank`, `Read` or `Generate`), and
turns the `Answer` to an item into a `Judgement`. `data.py` finds the files (`--data`, or ten built-in items
of every format). `registry.py` finds tasks and suites by name::

    from herd.evals.tasks import Data, make_task

    task = make_task("boolq", shots=5, mode="base")
    items = task.items(Data())
    assert task.judge(items[0], task.example(items[0], right=True)).value == 1.0

`herd.evals.harness` runs tasks on a model. `herd.evals.results` describes the files that it writes.

`choice.py` has boolq, hellaswag, openbookqa, piqa, social_iqa, truthfulqa, winogrande and arc, `mmlu.py` has
mmlu, `word_problems.py` gsm8k and mgsm, `programs.py` human_eval and mbpp. Prompts for base models equal
those of EleutherAI's lm-eval (a test compares the strings). Worked examples (shots) are the first of the
training file. If there is none, they are the first *other* items of the file itself (lm-eval's ``first_n``
sampler). So all items of a task share one beginning, which is computed once. `questions.py`: a user's own
questions, with five judges.
"""

from .data import Data
from .registry import SUITES, TASKS, TaskEntry, make_task, suite_entries
from .task import Answer, Generate, Item, Likelihood, Mode, Rank, Read, Task

__all__ = [
    "SUITES", "TASKS", "Answer", "Data", "Generate", "Item", "Likelihood", "Mode", "Rank", "Read", "Task",
    "TaskEntry", "make_task", "suite_entries",
]  # fmt: skip
