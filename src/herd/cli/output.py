"""How verbs print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
"""The ``--json`` option of every verb that prints a result."""


def print_json(result: Any) -> None:
    """One JSON document on stdout; numbers that are not finite are refused rather than written as invalid JSON."""
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False, allow_nan=False)
    print()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table with the first ``left`` columns to the left and the others right. Nothing is cut to fit a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = [cell.ljust(width) for cell, width in zip(cells[:left], widths, strict=False)]
        placed += [cell.rjust(width) for cell, width in zip(cells[left:], widths[left:], strict=True)]
        return "  ".join(placed).rstrip()

    title = line(header)
    print(f"\033[1m{title}\033[0m" if sys.stdout.isatty() else title)
    print("─" * len(title))
    for row in rows:
        print(line(row))


def long_time(hours: float) -> str:
    """Time of a run: hours and minutes up to two days, then days, then years."""
    from ..report.units import duration

    if hours < 48:
        return duration(hours * 3600)
    return f"{hours / 24:,.1f} days" if hours < 24 * 1000 else f"{hours / 24 / 365.25:,.0f} years"
