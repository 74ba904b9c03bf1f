"""`herd raise`: train and evaluate a family of models from text, in minutes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

TEXT = "Your own text: a file, a folder, a pattern such as 'text/*.txt', or hf:NAME. Repeatable."


def raise_command(
    name: Annotated[str, typer.Option(help="Name of the run's folder.")] = "demo",
    full: Annotated[
        bool, typer.Option("--full", help="Train larger models on three times the tokens.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Try all stages in a minute, with tiny models.")
    ] = False,
    text: Annotated[list[str] | None, typer.Option(help=TEXT)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices. [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON at the end.")] = False,
) -> None:
    """Train a family of small models from text and evaluate it: teacher, long context, instruct, students.

    Without --text it uses the Python standard library and the project's own sentences in nine languages.
    """
    from rich.console import Console

    from ..errors import RecipeError
    from ..life import raise_herd
    from ..life.plan import Mode
    from ..life.show import Show
    from ..plan import compare

    if full and quick:
        raise RecipeError("--full and --quick exclude each other; give one of them")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):  # it is part of the names of recipes
        raise RecipeError(
            f"--name {name!r} must be letters, digits, '_', '.' and '-'; give its parent folder with --runs"
        )
    console = Console(stderr=json_)
    folder = runs / name
    mode: Mode | None = "full" if full else "quick" if quick else None
    run = raise_herd(folder, mode, seed=seed, text=text, resume=resume, show=Show({}, console))
    # A quick run's times are not predicted for this machine, and a resumed run was measured only in part.
    if not quick and not resume:
        compare.record_stages(name, (run.record(stage) for stage in run.plan.predicted_seconds))
    if json_:
        typer.echo((folder / "scores.json").read_text())
        return
    from ..life.summary import print_summary

    print_summary(run, console)
