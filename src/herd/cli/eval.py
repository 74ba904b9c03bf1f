"""`herd eval`: benchmarks for any checkpoint or endpoint, with how sure each number is; `herd eval compare` and others
of its kind are verbs beneath it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import CheckpointError, DataError
from . import eval_compare, eval_more
from .common import Json, print_json, print_table

if TYPE_CHECKING:
    from ..evals.harness import Model
    from ..evals.local import LocalModel
    from ..evals.results import Evaluation, ItemResult, TaskResult
    from ..evals.tasks import Mode, Task

RUN = "run"


class _RunFirst(TyperGroup):
    """``herd eval MODEL`` is ``herd eval run MODEL``: what is no verb of the group is a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RunFirst, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Benchmarks for any checkpoint: herd eval MODEL [--suite leak]."""


@app.command(RUN)
def eval_command(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, hf:ORG/NAME, or http://HOST:PORT.")],
    suite: Annotated[str | None, typer.Option(help="A suite (herd eval list); leak if no --tasks.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks by name instead, e.g. boolq,piqa.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many items of each task.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of data sets; the ten built-in items of each if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; runs/evals/NAME-HASH if not given.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Worked examples before each item; the suite's if not given.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="base: continue text; instruct: talk. What the model is if not given.")
    ] = None,
    name: Annotated[str | None, typer.Option("--model", help="The model's name at an endpoint.")] = None,
    batch: Annotated[int, typer.Option(help="Answers written at once.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="For --suite fidelity: the model it is measured against.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run benchmarks on a model. Interrupted, the same command goes on; what is known is not asked again."""
    from ..evals.harness import evaluate
    from ..evals.tasks import Data

    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit} must be at least 1")
    if mode not in (None, "base", "instruct"):
        raise DataError(f"--mode {mode} is unknown: use base or instruct")
    if suite is not None and tasks is not None:
        raise DataError("--suite and --tasks: give one of the two")
    if suite == "fidelity":
        if parent is None:
            raise DataError(
                "--suite fidelity needs --parent CHECKPOINT: the model this one is measured against"
            )
        return eval_more.fidelity(model, parent, data, limit, out, dtype, device, as_json)
    source = Data() if data is None else Data(data)
    planned = _plan(suite, tasks)
    opened = _open(model, name, mode, dtype, device, batch)
    chosen, unknown = _make(planned, shots, mode or opened.mode)
    folder = out or results_folder(opened)
    with _watch() as watcher:
        evaluation = evaluate(opened, chosen, source, folder, limit=limit, watcher=watcher, suite=suite or "")
    rows = [*evaluation.tasks, *unknown]
    if as_json:
        print_json(
            {**evaluation.summary, "folder": str(folder), "tasks": [dataclasses.asdict(row) for row in rows]}
        )
    else:
        _print(evaluation, rows, folder, source.builtin)
    if any(row.status != "done" for row in rows):
        raise typer.Exit(1)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """All suites and tasks: version, source, licence, where shots come from."""
    from ..evals.tasks import SUITES, TASKS, make
    from ..evals.tasks.mmlu import SUBJECTS

    known = [make(name) for name in TASKS]
    if as_json:
        fields = ("name", "version", "shots", "metric", "source", "licence", "shots_from")
        suites = {name: [dataclasses.asdict(entry) for entry in entries] for name, entries in SUITES.items()}
        print_json(
            {"suites": suites, "tasks": [{field: getattr(task, field) for field in fields} for task in known]}
        )
        return
    of_subjects = {f"mmlu_{subject}" for subjects in SUBJECTS.values() for subject in subjects}
    for name, entries in SUITES.items():
        print(f"{name}: {', '.join(entry.task for entry in entries)}")
    print("fidelity: KL, same first choice and flipped items against --parent MODEL\n")
    header = ("task", "metric", "version", "shots", "shots from", "licence", "source")
    shown = [task for task in known if task.name not in of_subjects]
    rows = [(t.name, t.metric, t.version, str(t.shots), t.shots_from, t.licence, t.source) for t in shown]
    print_table(header, rows, left=len(header))
    print(
        f"mmlu_SUBJECT: one of {len(of_subjects)} subjects; lm-eval:NAME: a task of lm-eval's own, data from the Hub"
    )


app.command("compare")(eval_compare.compare_command)
app.command("fidelity")(eval_more.fidelity)
app.command("contamination")(eval_more.contamination)


def _plan(suite: str | None, tasks: str | None) -> Sequence[Any]:
    from ..evals import tasks as registry

    if tasks is None:
        return registry.suite(suite or "leak")
    return [registry.Entry(name.strip()) for name in tasks.split(",") if name.strip()]


def _make(planned: Sequence[Any], shots: int | None, mode: Any) -> tuple[list[Task], list[TaskResult]]:
    """The tasks, and a row for every name that is none: the others go on."""
    from ..evals.results import TaskResult
    from ..evals.tasks import make

    made, unknown = [], []
    for entry in planned:
        try:
            made.append(make(entry.task, entry.shots if shots is None else shots, entry.mode or mode))
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


def open_local(model: str, mode: Any, dtype: str | None, device: str | None, batch: int) -> LocalModel:
    """A checkpoint as the harness asks it; ``mode`` None: what it was trained for."""
    from ..checkpoint import checkpoint_hash
    from ..evals.local import LocalModel
    from .chat_model import open_model

    talker = open_model(model, dtype, device)
    lineage = talker.lineage
    if mode is None and lineage is None:
        print(
            f"{model}: nothing says what it was trained for: asked as an instruct model (--mode base)",
            file=sys.stderr,
        )
    hash_ = (lineage.weights_hash if lineage else None) or checkpoint_hash(talker.folder)
    called = lineage.name if lineage else talker.folder.resolve().name
    kind: Mode = mode or ("base" if talker.base else "instruct")
    return LocalModel(talker.model, talker.tokenizer, name=called, hash=hash_, mode=kind, max_batch=batch)


def results_folder(model: Model) -> Path:
    """Where a model's results go unless told otherwise."""
    return Path("runs") / "evals" / f"{_safe(model.name)}-{model.hash[:8]}"


def _print(evaluation: Evaluation, rows: Sequence[TaskResult], folder: Path, builtin: bool) -> None:
    header = ("task", "shots", "mode", "metric", "score", "95 % interval", "items", "s")
    print_table(header, [_row(row) for row in rows])
    for row in rows:
        if row.reason or row.note:
            print(f"{row.task}: {'not run: ' if row.reason else ''}{row.reason or row.note}")
    if builtin:
        print(
            "On the ten built-in items of each format: a check that all works, not a score. Real ones: --data DIR"
        )
    print(f"{evaluation.model}: items and summary in {folder}")


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


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


@contextmanager
def _watch() -> Iterator[Any]:
    """A live table in a terminal; elsewhere a line a task."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live

    table = _Table()
    with Live(
        get_renderable=table.render, console=Console(file=sys.stderr), transient=True, refresh_per_second=4
    ):
        yield table


class _Lines:
    """One line on stderr when a task has ended."""

    def begin(self, task: Task, done: int, total: int) -> None:
        print(f"{task.name}: {total} items" + (f", {done} known" if done else ""), file=sys.stderr)

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None: ...

    def end(self, result: TaskResult) -> None:
        said = result.score or f"not run: {result.reason}"
        print(f"{result.task}: {said}", file=sys.stderr)


@dataclasses.dataclass
class _Progress:
    done: int
    total: int
    value: float = 0.0
    asked: int = 0
    began: float = dataclasses.field(default_factory=time.monotonic)
    ended: str = ""


class _Table:
    """Tasks as they run: how many items, the score so far, the time left."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Progress] = {}

    def begin(self, task: Task, done: int, total: int) -> None:
        self._tasks[task.name] = _Progress(done, total)

    def advance(self, task: Task, results: Sequence[ItemResult]) -> None:
        progress = self._tasks[task.name]
        progress.done += len(results)
        progress.asked += len(results)
        progress.value += sum(result.value for result in results)

    def end(self, result: TaskResult) -> None:
        said = str(result.score) if result.score else f"not run: {result.reason}"
        self._tasks.setdefault(result.task, _Progress(0, 0)).ended = said

    def render(self) -> Any:
        from rich.table import Table

        table = Table("task", "items", "score so far", "left", box=None, pad_edge=False)
        for name, p in self._tasks.items():
            if p.ended:
                table.add_row(name, "", p.ended, "")
                continue
            score = _percent(p.value / p.asked) if p.asked else ""
            rest = (time.monotonic() - p.began) / p.asked * (p.total - p.done) if p.asked else 0.0
            table.add_row(name, f"{p.done:,} of {p.total:,}", score, f"{rest:,.0f} s" if p.asked else "")
        return table
