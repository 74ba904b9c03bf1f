"""`herd eval compare`: evaluations side by side, as a page and as data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, print_json


def compare_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of herd eval; others are compared with the first.")
    ],
    out: Annotated[Path, typer.Option(help="Where compare.html, .json, .csv and .md go.")] = Path(
        "runs/evals"
    ),
    as_json: Json = False,
) -> None:
    """Evaluations side by side: paired differences, flipped items, what others published, verdicts."""
    from ..evals.compare import compare
    from ..evals.compare_page import as_markdown, write_comparison
    from ..evals.results import read_evaluation

    comparison = compare([read_evaluation(folder) for folder in folders])
    paths = write_comparison(comparison, out)
    if as_json:
        print_json(comparison.record() | {"files": {kind: str(path) for kind, path in paths.items()}})
    else:
        print(as_markdown(comparison))
        print(f"page: {paths['html']}")
