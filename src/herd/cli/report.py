"""`herd report`: write the page of a run again from its records, without loading a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, print_json


def report_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, e.g. runs/demo.")], as_json: Json = False
) -> None:
    """Write RUN/report.html again from the run's records. Parts that were not measured say so."""
    from ..report.page import build_page

    page = build_page(run)
    if as_json:
        print_json({"run": str(run), "page": str(page), "bytes": page.stat().st_size})
    else:
        print(page)
