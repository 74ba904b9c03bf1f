"""`herd raise`: the whole life, from text to a page, resumable at any instant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..data.corpus import read_corpus
from ..errors import DataError, HerdError
from ..machine import lock_folder
from ..report.units import duration
from . import measure, stages
from .plan import Mode, Plan, quick_plan, timed_plan
from .probe import probe
from .run import RaiseRun, RaiseStage
from .show import Show

STAGES = [
    RaiseStage("tokenizer", "corpus, byte-level BPE, token shards", stages.make_tokenizer),
    RaiseStage("teacher", "pre-training from random weights", stages.pretrain),
    RaiseStage("long", "a longer context, gated by needles", stages.extend),
    RaiseStage("instruct", "dialogs with tools, in eight languages", stages.instruct),
    RaiseStage("student", "pruned from the instruct model, distilled by it", stages.student),
    RaiseStage("control", "the student's shape from random weights, same tokens", stages.control),
    RaiseStage("measure", "every model against the same held-out items", measure.measure),
    RaiseStage("report", "one page", measure.report),
]

VOCAB_SIZE = 4096


def plan_run(name: str, mode: Mode, seed: int, text: list[str] | None, show: Show) -> Plan:
    """Decide a run: look at the user's text, probe the machine, choose sizes. Writes nothing."""
    if text is not None:
        next(iter(read_corpus(text)))  # refuses what is missing or broken before anything is written
    if mode == "quick":
        return quick_plan(name, seed, text)
    show.line("[bold]probe[/bold]  how fast this machine trains  [dim](10 s)[/dim]")
    speeds = probe(VOCAB_SIZE, mode)
    for (dim, n_layers), speed in speeds.rungs.items():
        show.line(f"  {dim} wide, {n_layers} layers: {speed:,.0f} tokens/s in {speeds.dtype}")
    return timed_plan(name, mode, seed, text, VOCAB_SIZE, speeds)


def raise_herd(
    folder: Path,
    mode: Mode | None = None,
    *,
    seed: int | None = None,
    text: list[str] | None = None,
    resume: bool = False,
    show: Show,
) -> RaiseRun:
    """Raise a herd into ``folder``. With ``resume`` a run that is there goes on by its plan; without, that is an error.

    ``mode`` is "demo" and ``seed`` 0 where None is given; on resuming, what is given must be what the run began with.
    Raises `HerdError`s for anything wrong with text, machine or folder, and KeyboardInterrupt when stopped, after which
    the run can be resumed.
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
            if fresh and not run.done(
                STAGES[0].name
            ):  # the text was no good: nothing to resume, leave nothing
                shutil.rmtree(folder)
            raise
    return run


def refuse_other_options(run: RaiseRun, given: dict[str, Any]) -> None:
    """Raise `DataError` where an option (None: not given) contradicts the plan the run began with."""
    for name, value in given.items():
        begun = getattr(run.plan, name)
        if value is not None and value != begun:
            raise DataError(
                f"{run.folder} was started with {name} {begun!r}, not {value!r}: leave the option out to resume it, "
                "or choose another --name"
            )


def describe(run: RaiseRun) -> None:
    """What is about to happen, in two lines."""
    plan = run.plan
    teacher, student = plan.teacher_config, plan.student_config
    total = sum(plan.predicted_seconds.values())
    run.show.line(
        f"teacher {teacher.n_params / 1e6:.2f} M parameters ({teacher.dim} wide, {teacher.n_layers} layers), "
        f"student {student.n_params / 1e6:.2f} M, vocabulary {plan.vocab_size}; about {duration(total)} in all"
    )
    run.show.line(f"[dim]into {run.folder}; Ctrl-C stops at any moment, --resume goes on[/dim]")
