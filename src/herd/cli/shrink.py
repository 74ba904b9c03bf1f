"""`herd shrink`: make the best student that fits a budget, or do one part of that."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import units
from ..dtypes import fast_dtype
from ..errors import ConfigError
from .common import MODEL, RUN, Json, RunFirst, Threads, checked, print_json, print_table

if TYPE_CHECKING:
    from ..distill.arms import StudentPipeline
    from ..distill.cells import ShrinkSettings
    from ..distill.shrink import Shrinker, Shrunk

app = typer.Typer(cls=RunFirst, add_completion=False, no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help=MODEL)]
To = Annotated[str | None, typer.Option(help="Budget: params=95M, memory=150MB,context=8k or speed=20tok/s.")]
Vocab = Annotated[
    list[int],
    typer.Option(help="Allowed size of the vocabulary; repeat it for several (default: unchanged)."),
]
Text = Annotated[list[str], typer.Option(help="Text to train on: a file, folder or pattern. Repeatable.")]
Dialogs = Annotated[list[str], typer.Option(help="Dialogs to train on: a file; repeat it for several.")]
Heldout = Annotated[
    list[str], typer.Option(help="Text to measure on, which is not trained on (default: a tenth of --text).")
]
OwnText = Annotated[bool, typer.Option("--self", help="Let the model itself write text to train on.")]
Tokens = Annotated[int, typer.Option(min=0, help="Tokens to distil the winner on; 0: only prune.")]
RaceTokens = Annotated[int, typer.Option(min=0, help="Tokens for every arm of the race; 0: no race.")]
Arms = Annotated[int, typer.Option(min=1, help="Number of shapes to race.")]
Context = Annotated[int, typer.Option(min=16, help="Tokens of a row.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of an update.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate (default: the best of a sweep).")]
Sweep = Annotated[int, typer.Option(min=0, help="Tokens per learning rate of the sweep; 0: 0.1 / width.")]
Compute = Annotated[str, typer.Option("--dtype", help="Compute in fp32, bf16 or auto (bf16 if fast here).")]
HeldoutTokens = Annotated[int, typer.Option(min=100, help="Held-out tokens to measure on.")]
Seed = Annotated[int, typer.Option(help="Seed of the order of the rows, the draws and the controls.")]
Gguf = Annotated[
    str | None, typer.Option(help="Also quantize the student (q8, q4, q4k, ...; see herd quantize), or f16.")
]
QadTokens = Annotated[
    int,
    typer.Option(min=0, help="Tokens to distil the student on in the format of --gguf; 0: only round it."),
]
CorrectTokens = Annotated[
    int,
    typer.Option(
        "--correct-teacher", metavar="TOKENS", min=0, help="Train the teacher on the text before it labels."
    ),
]
Tasks = Annotated[
    list[str], typer.Option("--task", help="A task of herd eval for the ledger; repeat it for several.")
]
TaskData = Annotated[
    str | None, typer.Option(help="Folder of the tasks' items (default: the built-in ones).")
]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="Use only the first N items of each task.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/shrink-MODEL).")]


@app.callback()
def _group() -> None:
    """Make a smaller student of a model: herd shrink MODEL --to params=95M --text PATH."""


@app.command(RUN)
def shrink_command(
    model: Model, to: To = None, vocab: Vocab = [], text: Text = [], dialogs: Dialogs = [],
    heldout: Heldout = [], own_text: OwnText = False, tokens: Tokens = 1_300_000,
    race_tokens: RaceTokens = 250_000, arms: Arms = 3, context: Context = 512, batch: Batch = 4,
    lr: Rate = None, sweep_tokens: Sweep = 50_000, dtype: Compute = "auto",
    heldout_tokens: HeldoutTokens = 20_000, seed: Seed = 0, gguf: Gguf = None, qad_tokens: QadTokens = 0,
    correct_teacher: CorrectTokens = 0, task: Tasks = [], task_data: TaskData = None,
    task_limit: TaskLimit = None, out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print shapes, time and bytes.")] = False,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Plan students within a budget, race them, distil the best, and write it with a ledger.

    Ends with exit code 1 if a step made the model worse, or if the student is worse than a control.
    """
    settings = _settings(
        dtype, model=model, to=to, vocab=vocab, text=text, dialogs=dialogs, heldout=heldout,
        own_text=own_text, tokens=tokens, race_tokens=race_tokens, arms=arms, context=context,
        batch_size=batch, lr=lr, sweep_tokens=sweep_tokens, heldout_tokens=heldout_tokens, seed=seed,
        gguf=gguf, qad_tokens=qad_tokens, correct_tokens=correct_teacher, tasks=task, task_data=task_data,
        task_limit=task_limit,
    )  # fmt: skip
    if dry_run:
        if own_text and not text and not dialogs:
            raise ConfigError("--dry-run reads text and does not let the model write it: give --text too")
        with tempfile.TemporaryDirectory() as folder:  # so that the run may have other settings
            foreseen = settings.model_copy(update={"own_text": False})
            _print_forecast(_shrinker(foreseen, Path(folder)), as_json)
        return
    shrinker = _shrinker(settings, out)
    if not as_json:
        _print_shapes(shrinker)
    done = shrinker.run()
    _print_result(done, as_json)
    if done.failures:
        raise typer.Exit(1)


@app.command("race")
def race_command(
    model: Model, to: To = None, vocab: Vocab = [], text: Text = [], dialogs: Dialogs = [],
    heldout: Heldout = [], race_tokens: RaceTokens = 250_000, arms: Arms = 3, context: Context = 512,
    batch: Batch = 4, lr: Rate = None, sweep_tokens: Sweep = 50_000, dtype: Compute = "auto",
    heldout_tokens: HeldoutTokens = 20_000, seed: Seed = 0, out: Out = None, threads: Threads = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Distil every planned shape briefly, with controls of the best one, and print the order."""
    if to is None:
        raise ConfigError("a race is between shapes of one budget: give --to, e.g. --to params=95M")
    settings = _settings(
        dtype, model=model, to=to, vocab=vocab, text=text, dialogs=dialogs, heldout=heldout,
        tokens=race_tokens, race_tokens=race_tokens, arms=arms, context=context, batch_size=batch, lr=lr,
        sweep_tokens=sweep_tokens, heldout_tokens=heldout_tokens, seed=seed,
    )  # fmt: skip
    shrinker = _shrinker(settings, out)
    best, steps = shrinker.race()
    rows = [{"name": step.name, "n_params": step.n_params} | step.quality.summary() for step in steps]
    if as_json:
        print_json({"best": best.label(shrinker.pipeline.config), "arms": rows})
        return
    _print_measured("arm", rows)
    print(f"best: {best.label(shrinker.pipeline.config)}")


@app.command("label")
def label_command(
    model: Model, vocab: Annotated[int | None, typer.Option(help="Size of the student's vocabulary.")] = None,
    text: Text = [], dialogs: Dialogs = [], heldout: Heldout = [], tokens: Tokens = 250_000,
    context: Context = 512,
    dtype: Compute = "auto", seed: Seed = 0, out: Out = None, threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Store draws from a teacher's predictions of a text. Several processes may work on the same folder."""
    settings = _settings(
        dtype, model=model, vocab=_sizes(vocab), text=text, dialogs=dialogs, heldout=heldout, tokens=tokens,
        context=context, seed=seed, **NO_RACE,
    )  # fmt: skip
    pipeline = _pipeline(settings, out)
    folder = pipeline.targets(vocab or pipeline.config.vocab_size, tokens)
    from ..data.targets import Targets

    targets = Targets(folder)
    n_tokens = targets.spec.n_rows * targets.spec.context
    if as_json:
        print_json({"folder": str(folder), "nbytes": targets.nbytes, "tokens": n_tokens})
    else:
        print(f"{folder}: targets of {n_tokens:,} tokens, {units.nbytes(targets.nbytes)}")


@app.command("score")
def score_command(
    model: Model, text: Text = [], dialogs: Dialogs = [], heldout: Heldout = [], context: Context = 512,
    drop: Annotated[int, typer.Option(min=0, help="Also find this many contiguous layers to drop.")] = 0,
    dtype: Compute = "auto", seed: Seed = 0, out: Out = None, threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure which neurons, heads, channels and layers of a model matter least."""
    settings = _settings(
        dtype, model=model, text=text, dialogs=dialogs, heldout=heldout, tokens=0, context=context, seed=seed,
        **NO_RACE,
    )  # fmt: skip
    pipeline = _pipeline(settings, out)
    scores, vocab = pipeline.scores(pipeline.config.vocab_size), pipeline.config.vocab_size
    layers = pipeline.block(vocab, drop) if drop else []
    if as_json:
        listed = {name: tensor.tolist() for name, tensor in vars(scores).items()}
        print_json(listed | {"layers_to_drop": layers})
        return
    rows = []
    for layer, (heads, neurons) in enumerate(zip(scores.heads_LH, scores.neurons_LF, strict=True)):
        weak = float((neurons < 0.1 * neurons.max()).float().mean())
        rows.append((str(layer), f"{heads.min() / heads.max():.2f}", f"{100 * weak:.0f} %"))
    print_table(("layer", "weakest head / strongest", "neurons below a tenth of the strongest"), rows)
    if layers:
        print(f"the {drop} layers that are missed least: {layers[0]} to {layers[-1]}")


@app.command("prune")
def prune_command(
    model: Model, text: Text = [], dialogs: Dialogs = [], heldout: Heldout = [],
    layers: Annotated[int | None, typer.Option(help="Layers to keep.")] = None,
    ffn: Annotated[int | None, typer.Option(help="FFN neurons to keep in every layer.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels to keep.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads to keep.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens of the vocabulary to keep.")] = None,
    context: Context = 512, dtype: Compute = "auto", heldout_tokens: HeldoutTokens = 20_000, seed: Seed = 0,
    out: Out = None, threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a pruned model of a given shape, not yet distilled, and measure it."""
    from ..distill.measure import Quality
    from ..distill.prune import check_target
    from ..distill.recovery import Arm
    from ..distill.shapes import Shape

    settings = _settings(
        dtype, model=model, vocab=_sizes(vocab), text=text, dialogs=dialogs, heldout=heldout, tokens=0,
        context=context, heldout_tokens=heldout_tokens, seed=seed, **NO_RACE,
    )  # fmt: skip
    pipeline = _pipeline(settings, out)
    shape = {"n_layers": layers, "ffn_dim": ffn, "dim": width, "n_heads": heads, "vocab_size": vocab}
    shape = {name: size for name, size in shape.items() if size is not None}
    if not shape:
        raise ConfigError("nothing is cut: give --layers, --ffn, --width, --heads or --vocab")
    config = pipeline.config.replace(**shape, head_dim=pipeline.config.head_dim)
    check_target(pipeline.config.replace(vocab_size=config.vocab_size), config)
    arm = Arm(Shape(config, "bf16", "bf16", 0.0).label(pipeline.config), config)
    record = pipeline.start(arm)
    folder = pipeline.cells.folder / "arms" / arm.name / "start"
    summary = Quality(**record["quality"]).summary()
    if as_json:
        print_json({"folder": str(folder), "n_params": config.n_params} | summary)
        return
    _print_measured("model", [{"name": arm.name, "n_params": config.n_params} | summary])
    print(f"{folder}: pruned and not trained; distil it with herd shrink or herd train")


# Settings ---------------------------------------------------------------------------------------------------


NO_RACE: dict[str, Any] = {"race_tokens": 0, "arms": 1, "sweep_tokens": 0}
"""Settings of the verbs that do one part of a run."""


def _sizes(vocab: int | None) -> list[int]:
    return [] if vocab is None else [vocab]


def _settings(dtype: str, **fields: Any) -> ShrinkSettings:
    """Return the checked settings of a run. Raises `ConfigError` that names the option."""
    from ..distill.cells import ShrinkSettings

    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return checked(ShrinkSettings, dtype=fast_dtype() if dtype == "auto" else dtype, **fields)


def _folder(settings: ShrinkSettings, out: Path | None) -> Path:
    from ..checkpoint.sources import model_name, resolve_model

    return out or Path("runs") / f"shrink-{model_name(resolve_model(settings.model)).lower()}"


def _pipeline(settings: ShrinkSettings, out: Path | None) -> StudentPipeline:
    from ..distill.arms import StudentPipeline
    from ..distill.cells import Cells

    return StudentPipeline(Cells(_folder(settings, out), settings, _say))


def _shrinker(settings: ShrinkSettings, out: Path | None) -> Shrinker:
    from ..distill.shrink import Shrinker

    target = None
    if settings.to is not None and settings.to.startswith("speed"):
        from .plan_options import measured_target

        target = measured_target()
    return Shrinker(_folder(settings, out), settings, _say, target)


# Printing ---------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_shapes(shrinker: Shrinker) -> None:
    teacher = shrinker.pipeline.config
    rows = [
        (s.label(teacher), f"{s.config.n_params:,}", f"{s.config.n_params / teacher.n_params:.0%}", s.weights,
         s.kv, f"{s.loss_increase:.3f}")
        for s in shrinker.shapes
    ]  # fmt: skip
    print_table(("student", "parameters", "of teacher", "weights", "cache", "added loss, nats/token"), rows)


def _print_forecast(shrinker: Shrinker, as_json: bool) -> None:
    from ..distill.forecast import forecast
    from ..units import duration, nbytes

    cells = forecast(shrinker)
    seconds, total = sum(cell.seconds for cell in cells), sum(cell.nbytes for cell in cells)
    if as_json:
        shapes = [
            {
                "name": s.label(shrinker.pipeline.config),
                "n_params": s.config.n_params,
                "harm": s.loss_increase,
            }
            for s in shrinker.shapes
        ]
        print_json(
            {"shapes": shapes, "cells": [vars(cell) for cell in cells], "seconds": seconds, "nbytes": total}
        )
        return
    _print_shapes(shrinker)
    print()
    print_table(("step", "time", "on disk"), [(c.name, duration(c.seconds), nbytes(c.nbytes)) for c in cells])
    print(f"together {duration(seconds)} and {nbytes(total)}; nothing was trained")


def _print_measured(what: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print sizes and qualities of models. ``what`` is the title of their names."""
    table = []
    for row in rows:
        values = (f"{row[name]['value']:.4f}" for name in ("bits_per_byte", "kl", "accuracy"))
        table.append((row["name"], f"{row['n_params']:,}", *values))
    print_table((what, "parameters", "bits/byte", "KL", "accuracy"), table)


def _print_result(done: Shrunk, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(done.folder), "failures": done.failures, "ledger": done.ledger})
        return
    _print_measured("model", done.ledger["steps"])
    scored = [row for row in done.ledger["steps"] if row["scores"]]
    print()
    cells = [(row["name"], *(f"{score['value']:.1%}" for score in row["scores"].values())) for row in scored]
    print_table(("model", *scored[0]["scores"]), cells)
    for failure in done.failures:
        print(f"WORSE: {failure}")
    for packed in sorted(done.folder.parent.glob("model-*")):
        print(f"{packed}: the student in {packed.name.removeprefix('model-')}")
    print(f"{done.folder}: the student; {done.folder.parent / 'ledger.html'}: what every step kept")
