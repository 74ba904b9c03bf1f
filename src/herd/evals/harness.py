"""Run tasks on a model: ask the items without a stored result, judge the answers, store them, and sum up.

One call runs a suite::

    from herd.evals.harness import evaluate
    out = Path("runs/evals/student-1a2b3c4d")
    evaluation = evaluate(model, [make("boolq"), make("piqa")], Data(), out, limit=100)
    for row in evaluation.tasks: print(row.task, row.status, row.score or row.reason)

The model is anything with the members of `Model`: a checkpoint (`local.py`) or an endpoint (`endpoint.py`).
Items with the same beginning are asked together. A task that cannot run (a file is missing, the context is
too short, the endpoint gives no log-probabilities) becomes a row with the reason and the cure, and the other
tasks still run. Stopping at any moment, even by kill -9, loses only the items in progress. The next call
finds the others in the task's file (`results.py`) and asks only the missing ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import ContextError, HerdError
from .results import (
    Evaluation,
    ItemResult,
    TaskFile,
    TaskResult,
    digest,
    read_evaluation,
    results_file,
    write_summary,
)
from .tasks.data import Data
from .tasks.task import Answer, Generate, Item, Mode, Rank, Request, Task

SCHEMA = 1
BATCH = 32
"""Items that are judged and written together. At most this many are lost by a kill."""


class Model(Protocol):
    """A model that the harness can ask.

    ``hash`` identifies the weights (or the endpoint and its model), ``precision`` is the dtype.
    """

    name: str
    hash: str
    precision: str
    mode: Mode

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield pairs (index of the request, answer) in any order, each as soon as it is known.

        Raises `HerdError` with a cure, before computing anything, if a request cannot be answered.
        """
        ...


class Watcher(Protocol):
    """An observer of progress."""

    def begin(self, task: Task, done: int, total: int) -> None: ...

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None: ...

    def end(self, result: TaskResult) -> None: ...


def evaluate(
    model: Model, tasks: Sequence[Task], data: Data, out: Path, *, limit: int | None = None,
    watcher: Watcher | None = None, **more: Any,
) -> Evaluation:  # fmt: skip
    """Run every task on ``model`` with the first ``limit`` items.

    ``out`` is the model's folder of results.

    Returns the rows of these tasks. summary.json is written after every task. It also contains the rows of
    earlier calls and the values ``more``.
    """
    asked = {(task.name, digest(task.settings)) for task in tasks}
    known = read_evaluation(out).tasks if (out / "summary.json").is_file() else ()
    earlier = [row for row in known if (row.task, digest(row.settings)) not in asked]
    rows: list[TaskResult] = []
    for task in tasks:
        rows.append(run_task(model, task, data, out, limit=limit, watcher=watcher))
        if watcher:
            watcher.end(rows[-1])
        about = {"mode": model.mode, "data": data.label, "limit": limit, "precision": model.precision} | more
        write_summary(out, model.name, model.hash, [*earlier, *rows], **about)
    return replace(read_evaluation(out), tasks=rows)


def run_task(
    model: Model,
    task: Task,
    data: Data,
    out: Path,
    *,
    limit: int | None = None,
    watcher: Watcher | None = None,
) -> TaskResult:
    """Run one task. An error that a user can cause is returned as a row with the status "failed"."""
    began = time.monotonic()
    task = task.fitted(model)
    row = TaskResult(
        task.name, "done", version=task.version, settings=task.settings, source=task.source,
        licence=task.licence, shots_from=task.shots_from, data=task.data_label(data),
    )  # fmt: skip
    try:
        every = task.items(data)
        items = every[:limit]
        head = {"schema": SCHEMA, "model": model.hash, "precision": model.precision, "task": task.name}
        # everything except the data that results depend on
        head |= {"version": task.version, "settings": task.settings}
        path = results_file(out, f"{task.name}-{task.shots}shot-{task.mode}", head)
        with TaskFile(path, head) as file:
            results = _results(model, task, items, file, watcher)
        scores = [score.record() for score in task.scores(results)]
    except HerdError as error:
        fewer = f" or fewer than {task.shots} shots" if isinstance(error, ContextError) and task.shots else ""
        return replace(row, status="failed", reason=f"{error}{fewer}", seconds=time.monotonic() - began)
    return replace(
        row, scores=scores, note=task.note(data), n_items=len(items), n_total=len(every), file=path.name,
        seconds=time.monotonic() - began, ids=[item.id for item in items],
    )  # fmt: skip


def _results(
    model: Model, task: Task, items: Sequence[Item], file: TaskFile, watcher: Watcher | None
) -> list[ItemResult]:
    """Return the results of ``items`` in order. Ask, judge and write those that are not in the file."""
    digests = {item.id: task.fingerprint(item) for item in items}
    known = file.done
    waiting = [i for i in items if i.id not in known or known[i.id].digest != digests[i.id]]
    if watcher:
        watcher.begin(task, len(items) - len(waiting), len(items))
    waiting.sort(key=lambda item: _beginning(item.request))  # equal beginnings share computation
    batch: list[tuple[Item, Answer]] = []

    def keep() -> None:
        judgements = task.judge_all(batch)
        results = [
            ItemResult(
                item.id, j.value, item.gold, j.extracted, _output(answer), item.group, dict(j.metrics), j.why,
                answer.finish_reason, digests[item.id],
            )
            for (item, answer), j in zip(batch, judgements, strict=True)
        ]  # fmt: skip
        batch.clear()
        file.add(results)
        if watcher:
            watcher.advance(task, results)

    for index, answer in model.answer([item.request for item in waiting]) if waiting else ():
        batch.append((waiting[index], answer))
        if len(batch) == BATCH:
            keep()
    if batch:
        keep()
    return [file.done[item.id] for item in items]


def _output(answer: Answer) -> Any:
    return [[x.nats, x.greedy, x.n_tokens] for x in answer.likelihoods] or answer.text


def _beginning(request: Request) -> str:
    if isinstance(request, Generate):
        return str(request.prompt)
    return request.pairs[0][0] if isinstance(request, Rank) else request.text
