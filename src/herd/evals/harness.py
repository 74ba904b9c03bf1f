"""Runs tasks on a model: asks what is not yet answered, judges, keeps every item on disk, and sums up.

One call does a suite::

    from herd.evals.harness import evaluate
    evaluation = evaluate(model, [make("boolq"), make("piqa")], Data(), Path("runs/evals/student-1a2b3c4d"), limit=100)
    for row in evaluation.tasks: print(row.task, row.status, row.score or row.reason)

The model is anything with the four things of `Model`: a checkpoint (`local.py`) or an endpoint (`endpoint.py`). Items
that share a beginning are asked together. A task that cannot run (a file is missing, the context too short, no
logprobs) becomes a row that says why and what to do, and the others go on. Stopping at any moment, even by kill -9,
loses at most the items under way; the next call finds the rest in the task's file (`results.py`) and asks only what is
missing. So the same call is the cache: nothing is asked twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import ContextError, HerdError
from .results import Evaluation, ItemResult, TaskFile, TaskResult, digest, read_evaluation, write_summary
from .tasks.data import Data
from .tasks.task import Answer, Generate, Item, Judgement, Mode, Rank, Request, Task

SCHEMA = 1
BATCH = 32
"""Items judged and written at a time: what a kill can cost."""


class Model(Protocol):
    """What the harness asks. ``hash`` names the weights (or the endpoint and its model), ``precision`` the dtype."""

    name: str
    hash: str
    precision: str
    mode: Mode

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """(number of the request, its answer), in any order, as they come.

        Everything is checked before anything is computed: HerdError names what cannot be served, and the cure.
        """
        ...


class Watcher(Protocol):
    """Told of progress; what draws the table."""

    def begin(self, task: Task, done: int, total: int) -> None: ...

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None: ...

    def end(self, result: TaskResult) -> None: ...


class Quiet:
    """Watches without a word."""

    def begin(self, task: Task, done: int, total: int) -> None: ...

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None: ...

    def end(self, result: TaskResult) -> None: ...


def evaluate(
    model: Model,
    tasks: Sequence[Task],
    data: Data,
    out: Path,
    *,
    limit: int | None = None,
    watcher: Watcher | None = None,
    **more: Any,
) -> Evaluation:
    """Every task on ``model``, the first ``limit`` items of each; ``out`` is the model's folder.

    Gives the rows of these tasks; summary.json, written anew after every task, keeps those of earlier calls too, and
    takes ``more``.
    """
    watcher = watcher or Quiet()
    rows: list[TaskResult] = []
    asked = {(task.name, digest(task.settings)) for task in tasks}
    earlier = [row for row in _earlier(out) if (row.task, digest(row.settings)) not in asked]
    for task in tasks:
        rows.append(run_task(model, task, data, out, limit=limit, watcher=watcher))
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
    """One task; whatever a user can cause comes back as a row with status "failed"."""
    began = time.monotonic()
    task = task.fitted(model)
    about: dict[str, Any] = {
        "version": task.version,
        "settings": task.settings,
        "source": task.source,
        "licence": task.licence,
        "shots_from": task.shots_from,
        "data": data.label,
    }
    try:
        every = task.items(data)
        items = every[:limit]
        path = out / file_name(model, task)
        results = _results(model, task, items, path, watcher or Quiet())
        scores = [score.record() for score in task.scores(results)]
    except HerdError as error:
        fewer = f" or fewer than {task.shots} shots" if isinstance(error, ContextError) and task.shots else ""
        return TaskResult(
            task.name, "failed", reason=f"{error}{fewer}", seconds=time.monotonic() - began, **about
        )
    return TaskResult(
        task.name,
        "done",
        scores=scores,
        note=task.note(data),
        n_items=len(items),
        n_total=len(every),
        seconds=time.monotonic() - began,
        file=path.name,
        ids=[item.id for item in items],
        **about,
    )


def _earlier(out: Path) -> Sequence[TaskResult]:
    return read_evaluation(out).tasks if (out / "summary.json").is_file() else ()


def head(model: Model, task: Task) -> dict[str, Any]:
    """The first line of a task's file: all that its items depend on besides the data."""
    return {
        "schema": SCHEMA,
        "model": model.hash,
        "precision": model.precision,
        "task": task.name,
        "version": task.version,
        "settings": task.settings,
    }


def file_name(model: Model, task: Task) -> str:
    """Readable, and unique for its head."""
    return f"{task.name}-{task.shots}shot-{task.mode}-{digest(head(model, task))[:8]}.jsonl"


def _results(
    model: Model, task: Task, items: Sequence[Item], path: Path, watcher: Watcher
) -> list[ItemResult]:
    """The results of ``items``, in their order; those not in the file are asked, judged and written to it."""
    digests = {item.id: digest(item.request) for item in items}
    with TaskFile(path, head(model, task)) as file:
        known = file.done
        waiting = [i for i in items if i.id not in known or known[i.id].digest != digests[i.id]]
        watcher.begin(task, len(items) - len(waiting), len(items))
        # like beginnings side by side: whoever computes can share them
        waiting.sort(key=lambda item: _beginning(item.request))
        batch: list[tuple[Item, Answer]] = []
        for number, answer in model.answer([item.request for item in waiting]) if waiting else ():
            batch.append((waiting[number], answer))
            if len(batch) == BATCH:
                _keep(task, file, batch, digests, watcher)
                batch = []
        _keep(task, file, batch, digests, watcher)
        return [file.done[item.id] for item in items]


def _keep(
    task: Task,
    file: TaskFile,
    batch: Sequence[tuple[Item, Answer]],
    digests: dict[str, str],
    watcher: Watcher,
) -> None:
    if not batch:
        return
    judgements = task.judge_all(batch)
    results = [_line(*pair, j, digests[pair[0].id]) for pair, j in zip(batch, judgements, strict=True)]
    file.add(results)
    watcher.advance(task, results)


def _line(item: Item, answer: Answer, judgement: Judgement, request_digest: str) -> ItemResult:
    output: Any = [[x.nats, x.greedy, x.n_tokens] for x in answer.likelihoods] or answer.text
    return ItemResult(
        item.id,
        judgement.value,
        item.gold,
        judgement.extracted,
        output,
        item.group,
        dict(judgement.metrics),
        judgement.why,
        answer.finish_reason,
        request_digest,
    )


def _beginning(request: Request) -> str:
    if isinstance(request, Generate):
        return request.prompt if isinstance(request.prompt, str) else str(request.prompt)
    return request.pairs[0][0] if isinstance(request, Rank) else request.text
