"""`herd eval`: run benchmarks on a checkpoint or an endpoint.

Each score is printed with its confidence interval.

Its other verbs (compare, fidelity, contamination) are in `eval_compare.py`, and `ladder` in `eval_ladder.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, DataError
from . import eval_compare, eval_ladder
from .common import (
    MODEL,
    RUN,
    Device,
    Dtype,
    Json,
    RunFirst,
    Threads,
    print_json,
    print_table,
    progress_display,
)
from .eval_model import DataOption, Limit, Out, data_source, open_local, results_folder

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..evals.harness import Model, Watcher
    from ..evals.results import Evaluation, ItemResult, TaskResult
    from ..evals.tasks import Task


app = typer.Typer(cls=RunFirst, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Run benchmarks or your own questions on a model or an endpoint: herd eval MODEL [questions.jsonl]."""


@app.command(RUN)
def eval_command(
    model: Annotated[str, typer.Argument(help=MODEL + " Or http://HOST:PORT.")],
    questions: Annotated[
        list[str] | None, typer.Argument(help="Files of your own questions, e.g. questions.jsonl.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="A suite of `herd eval list`, e.g. llama31.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or files of questions instead of a suite, e.g. boolq,piqa.")
    ] = None,
    limit: Limit = None,
    data: DataOption = None,
    out: Out = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Worked examples (default: the suite's).")] = None,
    mode: Annotated[
        str | None, typer.Option(help="Prompts for a base or instruct model (default: as trained).")
    ] = None,
    name: Annotated[str | None, typer.Option("--model", help="Name of the model at an endpoint.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of answers to generate at once.")] = 32,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    parent: Annotated[str | None, typer.Option(help="The model that --suite fidelity compares with.")] = None,
    as_json: Json = False,
) -> None:
    """Run benchmarks or your own questions on a model.

    After an interruption the same command continues with the items that are missing.
    """
    from ..evals.harness import evaluate

    if mode not in (None, "base", "instruct"):
        raise DataError(f"--mode {mode} is unknown: use base or instruct")
    if suite is not None and tasks is not None:
        raise DataError("--suite and --tasks: give one of the two")
    if suite == "fidelity":
        if parent is None:
            raise DataError("--suite fidelity needs --parent CHECKPOINT, the model to compare with")
        eval_compare.fidelity_command(model, parent, data, limit, out, dtype, device, threads, as_json)
        return
    source, planned = data_source(data), _plan(suite, tasks, questions or [])
    opened = _open(model, name, mode, dtype, device, batch)
    chosen, unknown = _make(planned, shots, mode or opened.mode)
    folder = out or results_folder(opened)
    with _watch() as watcher:
        evaluation = evaluate(opened, chosen, source, folder, limit=limit, watcher=watcher, suite=suite or "")
    rows = [*evaluation.tasks, *unknown]
    if as_json:
        records = [dataclasses.asdict(row) for row in rows]
        print_json({**evaluation.summary, "folder": str(folder), "tasks": records})
    else:
        _print(evaluation, rows, folder, source.label)
    if any(row.status != "done" for row in rows):
        raise typer.Exit(1)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List all suites and tasks with their sources."""
    from ..evals.tasks import SUITES, TASKS, make_task
    from ..evals.tasks.mmlu import SUBJECTS

    known = [make_task(name) for name in TASKS]
    if as_json:
        fields = ("name", "version", "shots", "metric", "source", "licence", "shots_from")
        suites = {name: [dataclasses.asdict(entry) for entry in entries] for name, entries in SUITES.items()}
        tasks = [{field: getattr(task, field) for field in fields} for task in known]
        print_json({"suites": suites, "tasks": tasks})
        return
    of_subjects = {f"mmlu_{subject}" for subjects in SUBJECTS.values() for subject in subjects}
    for name, entries in SUITES.items():
        print(f"{name}: {', '.join(entry.task for entry in entries)}")
    print("fidelity: KL divergence, top-1 agreement and flipped items, compared with --parent MODEL\n")
    header = ("task", "metric", "version", "shots", "shots from", "licence", "source")
    shown = [task for task in known if task.name not in of_subjects]
    rows = [(t.name, t.metric, t.version, str(t.shots), t.shots_from, t.licence, t.source) for t in shown]
    print_table(header, rows, left=len(header))
    print(f"mmlu_SUBJECT: one of {len(of_subjects)} subjects")
    print("lm-eval:NAME: a task of lm-eval, with data from the Hub")
    print("FILE.jsonl: your own questions (docs/how-to/evaluate-your-own-questions.md)")


app.command("ladder")(eval_ladder.ladder_command)
app.command("compare")(eval_compare.compare_command)
app.command("fidelity")(eval_compare.fidelity_command)
app.command("contamination")(eval_compare.contamination_command)


def _plan(suite: str | None, tasks: str | None, questions: Sequence[str]) -> Sequence[Any]:
    """Return the entries of the question files, and those of the suite or the named tasks."""
    from ..evals import tasks as registry

    files = [registry.TaskEntry(path) for path in _question_files(questions)]
    if tasks is None:
        if suite is None and not files:
            raise DataError(
                f"name what to evaluate: --suite {', '.join(registry.SUITES)} (`herd eval list`), --tasks "
                "boolq,piqa, or a file of your own questions"
            )
        return files if suite is None else [*files, *registry.suite_entries(suite)]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise DataError(f"--tasks {tasks!r} names no task: choose from `herd eval list`, e.g. boolq,piqa")
    return [*files, *(registry.TaskEntry(name) for name in dict.fromkeys(names))]


def _question_files(paths: Sequence[str]) -> list[str]:
    """Return the paths of the question files. Their names must differ, because results are stored by name."""
    seen: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        if not Path(path).expanduser().is_file():
            raise DataError(f"{path}: no such file; give a file of questions, or --tasks NAME")
        if (other := seen.setdefault(Path(path).name, path)) != path:
            raise DataError(f"{path} and {other} have the same name; rename one of them")
    return list(seen.values())


def _make(planned: Sequence[Any], shots: int | None, mode: Any) -> tuple[list[Task], list[TaskResult]]:
    """Return (tasks, failed): the tasks to run, and a failed result for every name that is not a task."""
    from ..evals.results import TaskResult
    from ..evals.tasks import make_task

    made, unknown = [], []
    for entry in planned:
        try:
            made.append(make_task(entry.task, entry.shots if shots is None else shots, mode))
        except DataError as error:
            unknown.append(TaskResult(entry.task, "failed", reason=str(error)))
    return made, unknown


def _open(
    model: str, name: str | None, mode: Any, dtype: str | None, device: str | None, batch: int
) -> Model:
    if model.startswith(("http://", "https://")):
        from ..evals.endpoint import EndpointModel

        return EndpointModel(model, name, mode or "instruct")
    if name is not None:
        raise CheckpointError("--model names the model of an endpoint; a folder has only one")
    return open_local(model, mode, dtype, device, batch)


def _print(evaluation: Evaluation, rows: Sequence[TaskResult], folder: Path, data: str) -> None:
    header = ("task", "shots", "mode", "metric", "score", "95 % interval", "items", "s")
    print_table(header, [_row(row) for row in rows])
    for row in rows:
        if row.reason or row.note:
            print(f"{row.task}: {'not run: ' if row.reason else ''}{row.reason or row.note}")
    if data == "builtin" and any(row.data == data for row in rows):
        print("Only ten built-in items per task were used: enough to check the setup, too few for a score.")
        print("For real scores: --data hf downloads the data sets, --data DIR reads your own copies.")
    print(f"{evaluation.model}: items and summary are in {folder}")


def _row(row: TaskResult) -> tuple[str, ...]:
    shots, mode = (str(row.settings.get(key, "")) for key in ("shots", "mode"))
    score = row.score
    if score is None:
        return (row.task, shots, mode, "", "not run", "", "", "")
    number = _percent if score.unit == "fraction" else (lambda x: f"{x:.4g}")
    interval = "" if score.lo is None or score.hi is None else f"{number(score.lo)} to {number(score.hi)}"
    items = f"{row.n_items:,}" + ("" if row.n_items == row.n_total else f" of {row.n_total:,}")
    return (row.task, shots, mode, score.name, number(score.value), interval, items, f"{row.seconds:.1f}")


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


@contextmanager
def _watch() -> Iterator[Watcher]:
    """Show progress on stderr: bars in a terminal, else lines."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

    score = TextColumn("{task.fields[score]}", markup=False)
    columns = ("{task.description}", MofNCompleteColumn(), score, TimeRemainingColumn())
    with progress_display(*columns) as bars:
        yield _Bars(bars)


def _result_line(result: TaskResult) -> str:
    return str(result.score) if result.score else f"not run: {result.reason}"


class _Lines:
    """Progress as lines: one when a task begins and one when it ends."""

    def begin(self, task: Task, done: int, total: int) -> None:
        print(f"{task.name}: {total} items" + (f", {done} known" if done else ""), file=sys.stderr)

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None: ...

    def end(self, result: TaskResult) -> None:
        print(f"{result.task}: {_result_line(result)}", file=sys.stderr)


class _Bars:
    """Progress as a bar per task: items done, the mean of the new items so far, the remaining time."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._ids: dict[str, TaskID] = {}
        self._values: list[float] = []

    def begin(self, task: Task, done: int, total: int) -> None:
        self._values = []
        self._ids[task.name] = self._bars.add_task(task.name, total=total, completed=done, score="")

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None:
        self._values += [result.value for result in results]
        score = _percent(sum(self._values) / len(self._values))
        self._bars.update(self._ids[task.name], advance=len(results), score=score)

    def end(self, result: TaskResult) -> None:
        if result.task not in self._ids:  # the task failed before its first item
            self._ids[result.task] = self._bars.add_task(result.task, total=0, score="")
        self._bars.update(self._ids[result.task], score=_result_line(result))
