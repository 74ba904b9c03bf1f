"""`herd leak`: the news about Llama 3.1, claim by claim."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, print_json

if TYPE_CHECKING:
    from ..plan.leak import Claim

_COLOURS = {"true": "32", "half true": "33", "misread": "33", "false": "31"}


def command(
    html: Annotated[Path | None, typer.Option(help="Write a page to this file instead.")] = None,
    as_json: Json = False,
) -> None:
    """What the news said of the leaked Llama 3.1, and what is so: verdict, arithmetic, source, and what to type to see
    for yourself. Needs no weights."""
    from ..plan.leak import claims

    found = claims()
    if as_json:
        print_json([dataclasses.asdict(claim) for claim in found])
    elif html is not None:
        from ..files import write_atomically
        from ..plan.leak_page import page

        write_atomically(html, page(found))
        print(html)
    else:
        width = min(max(shutil.get_terminal_size().columns, 80), 100)
        for number, claim in enumerate(found, 1):
            print(_shown(number, claim, width, sys.stdout.isatty()))


def _shown(number: int, claim: Claim, width: int, colour: bool) -> str:
    """One claim as lines of at most ``width`` columns, in colour only where a person looks."""

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    inner = width - 4
    said = f"“{claim.said}”"
    lines = textwrap.wrap(said, inner - 12)
    lines = [line.ljust(inner - 10) for line in lines[:1]] + lines[1:]
    head = (
        f"{number:2}  "
        + paint(lines[0], "1")
        + paint(claim.verdict.rjust(10), f"1;{_COLOURS[claim.verdict]}")
    )
    out = [head, *("    " + paint(line, "1") for line in lines[1:])]
    out += ["    " + line for line in textwrap.wrap(claim.answer, inner)]
    out.append("")
    for what, value in claim.arithmetic:
        *above, last = textwrap.wrap(what, inner - 2 - len(value) - 2)
        out += [paint(f"      {line}", "2") for line in above]
        out.append(paint(f"      {last}".ljust(width - len(value)), "2") + value)
    source = textwrap.wrap("Source: " + "; ".join(claim.sources), inner, subsequent_indent="        ")
    out += ["", *(paint(f"    {line}", "2") for line in source), "    See:    " + paint(claim.see, "36"), ""]
    return "\n".join(out)
