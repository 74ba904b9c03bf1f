"""`herd raise`: all stages from text to a report. A run can be stopped and resumed at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .. import units
from ..data.corpus import read_corpus
from ..errors import DataError, HerdError
from ..machine import lock_folder
from ..units import duration
from . import measure, stages
from .plan import Mode, Plan, make_plan
from .probe import predict
from .run import RaiseRun, RaiseStage
from .show import Show

STAGES = [
    RaiseStage(
        "tokenizer", "training a byte-level BPE tokenizer, writing token shards", stages.make_tokenizer
    ),
    RaiseStage("teacher", "learning to copy, then to write text, from random weights", stages.teacher),
    RaiseStage("long", "extending the context, tested by loss and needles", stages.long),
    RaiseStage("instruct", "tuning on dialogs with tools, in eight languages", stages.instruct),
    RaiseStage("student", "pruning the instruct model and distilling it", stages.student),
    RaiseStage(
        "control", "training the student's shape from random weights on the same tokens", stages.control
    ),
    RaiseStage("measure", "evaluating every model on the same held-out items", measure.measure_models),
    RaiseStage("report", "writing the HTML page", measure.write_report),
]


def plan_run(name: str, mode: Mode, seed: int, text: list[str] | None, show: Show) -> Plan:
    """Return the plan of a run: check the user's text, and predict its time. Writes nothing."""
    if text is not None:
        next(iter(read_corpus(text)))  # missing or broken text is refused before anything is written
    plan = make_plan(name, mode, seed, text)
    if mode == "quick":
        return plan
    show.line("[bold]probe[/bold]  measuring this machine's training speed  [dim](10 s)[/dim]")
    timed = predict(plan)
    speeds = ", ".join(f"{speed:,.0f} in {dtype}" for dtype, speed in timed.speeds.items())
    show.line(f"  tokens/s: {speeds}. Every machine trains on the same tokens, here in {timed.dtype}.")
    return timed


def raise_herd(
    folder: Path,
    mode: Mode | None = None,
    *,
    seed: int | None = None,
    text: list[str] | None = None,
    resume: bool = False,
    show: Show,
) -> RaiseRun:
    """Train a family of models in ``folder``.

    With ``resume``, continue an existing run by its plan. The defaults are mode "demo" and seed 0. Options
    that are given with ``resume`` must equal the options of the start. Raises `HerdError` if the text, the
    machine or the folder cannot be used (for instance, if the folder exists and ``resume`` is False), and
    KeyboardInterrupt when stopped. A stopped run can be resumed.
    """
    fresh = not (resume and (folder / "run.json").exists())
    if fresh:
        RaiseRun.refuse_existing(folder)
        RaiseRun.create(folder, plan_run(folder.name, mode or "demo", seed or 0, text, show))
    with lock_folder(folder):
        run = RaiseRun(folder, RaiseRun.saved_plan(folder), show)
        refuse_other_options(run, {"mode": mode, "seed": seed, "text": text})
        show.predicted = run.plan.predicted_seconds
        describe(run)
        try:
            if not all(run.done(stage.name) for stage in STAGES):
                stages.bind_text(run, run.stage_folder(STAGES[0].name) / "stage.json")
            with show:
                run.carry_out(STAGES)
        except HerdError:
            # the text cannot be used, so there is nothing to resume
            if fresh and not run.done(STAGES[0].name):
                shutil.rmtree(folder)
            raise
    return run


def refuse_other_options(run: RaiseRun, given: dict[str, Any]) -> None:
    """Raise `DataError` if an option (None: not given) contradicts the plan of the existing run."""
    for name, value in given.items():
        planned = getattr(run.plan, name)
        if value is not None and value != planned:
            raise DataError(
                f"{run.folder} was started with {name} {planned!r}, not {value!r}: "
                "leave the option out to resume the run, or choose another --name"
            )


def describe(run: RaiseRun) -> None:
    """Print two lines about the run: sizes, time and folder."""
    plan = run.plan
    teacher, student = plan.teacher_config, plan.student_config
    total = sum(plan.predicted_seconds.values())
    run.show.line(
        f"Teacher: {units.si(teacher.n_params)} parameters, width {teacher.dim}, {teacher.n_layers} "
        f"layers. Student: {units.si(student.n_params)}. Vocabulary: {plan.vocab_size}. "
        f"Time: about {duration(total)}."
    )
    run.show.line(f"[dim]Folder: {run.folder}. Ctrl-C stops the run, herd raise --resume continues it.[/dim]")
