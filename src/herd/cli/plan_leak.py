"""`herd plan leak`: the news about Llama 3.1, claim by claim."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Json, print_json

if TYPE_CHECKING:
    from ..plan.leak import Claim

_COLOURS = {"true": "32", "half true": "33", "misread": "33", "false": "31"}  # ANSI green, yellow, red


def leak_command(
    html: Annotated[Path | None, typer.Option(help="Write an HTML page to this file instead.")] = None,
    as_json: Json = False,
) -> None:
    """Check ten claims of the news about the leaked Llama 3.1.

    Prints for each a verdict, the arithmetic, the sources and a command to try. Needs no weights.
    """
    from ..plan.leak import all_claims, claims_page

    claims = all_claims()
    if as_json:
        print_json([dataclasses.asdict(claim) for claim in claims])
    elif html is not None:
        from ..files import write_atomically

        write_atomically(html, claims_page(claims))
        print(html)
    else:
        width = min(max(shutil.get_terminal_size().columns, 80), 100)
        for number, claim in enumerate(claims, 1):
            print(_claim_text(number, claim, width, sys.stdout.isatty()))


def _claim_text(number: int, claim: Claim, width: int, colour: bool) -> str:
    """Return one claim as text in lines of at most ``width`` columns."""

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    def wrapped(text: str, further_indent: str = "    ") -> list[str]:
        return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent=further_indent)

    # The verdict is at the right end of the first line.
    first, *rest = textwrap.wrap(f"“{claim.said}”", width - 16)
    head = f"{number:2}  {paint(first.ljust(width - 14), '1')}"
    lines = [head + paint(claim.verdict.rjust(10), f"1;{_COLOURS[claim.verdict]}")]
    lines += [paint(f"    {line}", "1") for line in rest]
    lines += [*wrapped(claim.answer), ""]
    for what, value in claim.arithmetic:
        *above, last = textwrap.wrap(what, width - 8 - len(value))
        lines += [paint(f"      {line}", "2") for line in above]
        lines.append(paint(f"      {last}".ljust(width - len(value)), "2") + value)
    sources = wrapped("Source: " + "; ".join(claim.sources), further_indent=" " * 12)
    lines += ["", *(paint(line, "2") for line in sources), "    See:    " + paint(claim.see, "36"), ""]
    return "\n".join(lines)
