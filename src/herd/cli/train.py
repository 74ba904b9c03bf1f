"""`herd train`: train by a recipe. For several processes: `torchrun -m herd train RECIPE`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, picked, print_json, progress_display


def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML), e.g. recipes/tiny-lm.yaml.")],
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe for mistakes.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Train a few steps, predict the whole run.")
    ] = False,
    machine: Annotated[str | None, typer.Option(help="Rehearse for another machine, e.g. 64xH100.")] = None,
    script: Annotated[Path | None, typer.Option(help="Rehearse and write a Slurm script here.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe.

    Mistakes in the recipe are reported with their line before anything starts. Ctrl-C saves the state of the
    run, and the same command resumes it.
    """
    from ..train.recipe import read_recipe

    read = read_recipe(recipe)
    if check:
        _check(recipe, read, as_json)
        return
    if rehearse or machine or script:
        from .rehearse import rehearse_recipe

        rehearse_recipe(recipe, read, machine, script, as_json)
        return
    from ..train import parallel
    from ..train.run import run_recipe

    first = os.environ.get("RANK", "0") == "0"
    with step_progress(read.name, read.train.steps, show=first) as on_step:
        folder, result = run_recipe(read, on_step=on_step)
    parallel.stop()
    if not first:
        return
    planned = _planned(read, folder, result)
    if as_json:
        names = "step tokens seconds flops averaged resumed_from last"
        print_json({"model": str(folder), "predicted_seconds": planned} | picked(result, names))
    else:
        pace = result.tokens / result.seconds if result.seconds else 0.0
        print(f"{folder}: {result.tokens:,} tokens in {result.seconds:,.0f} s, {pace:,.0f} tokens/s")
        if planned is not None:
            error = 100 * (planned / result.seconds - 1)
            print(f"herd plan predicted {planned:,.0f} s ({error:+.0f} %); see herd plan score")


def _planned(recipe: Any, folder: Path, result: Any) -> float | None:
    """Return the seconds that a plan for this machine predicts for the run.

    None for a resumed run, for several ranks, and for an objective with parent models.
    """
    from ..checkpoint import load_config
    from ..plan import compare

    if recipe.parallel.ranks > 1 or result.resumed_from or recipe.objective.parents():
        return None
    config = load_config(folder)
    return compare.compare_training(config, recipe.train, result.seconds, result.step, recipe.name)


def _check(path: Path, recipe: Any, as_json: bool) -> None:
    """Check the recipe for its number of processes, and print its size."""
    from ..train.recipe import check_recipe

    config = check_recipe(recipe, recipe.parallel.ranks)
    tokens = recipe.train.steps * recipe.train.batch_size * recipe.train.context
    flops = tokens * config.flops_per_token(recipe.train.context / 2, training=True)
    if as_json:
        print_json({"recipe": str(path), "n_params": config.n_params, "tokens": tokens, "flops": flops})
    else:
        print(f"{path}: correct; {config.n_params:,} parameters, {tokens:,} tokens, {flops:.3g} FLOPs")


@contextmanager
def step_progress(name: str, steps: int, *, show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a progress bar in a terminal. In a log file, print a line after every twentieth of the steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_display("{task.description}", *columns, "{task.fields[note]}", show=show) as bar:
        task = bar.add_task(name, total=steps, note="")
        shown = -1

        def on_step(record: dict[str, Any]) -> None:
            nonlocal shown
            step = record["step"]
            note = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s"
            bar.update(task, completed=step, note=note)
            if show and bar.disable and step * 20 // steps > shown:
                shown = step * 20 // steps
                print(f"{name}: step {step:,} of {steps:,}  {note}", file=sys.stderr, flush=True)

        yield on_step
