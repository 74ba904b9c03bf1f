"""Code that all verbs share: common options, progress bars, tables for people and JSON for programs."""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from ..dtypes import parse_dtype
from ..errors import ConfigError

S = TypeVar("S")

MODEL = "A name (`herd list`), a checkpoint folder, a .gguf file, or hf:ORG/NAME[/FILE]."
"""Help text of an argument that `checkpoint.resolve_model` resolves."""
RUN = "run"
COMPUTE_DTYPES = ("fp32", "bf16", "fp16")


def _dtype(text: str | None) -> str | None:
    return None if text is None else _parsed(text, COMPUTE_DTYPES)


def _kv(text: str | None) -> str | None:
    return text if text in (None, "auto") else _parsed(text, ("fp32", "bf16", "int8"))


def _parsed(text: str, allowed: tuple[str, ...]) -> str:
    try:
        return parse_dtype(text, allowed)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _device(text: str | None) -> str | None:
    """Refuse a device that this machine or this build of torch does not have. ``cpu`` needs no check."""
    if text in (None, "cpu"):
        return text
    import torch

    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch is built without CUDA
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"{text!r} cannot be used here: {reason}") from error
    return text


def _threads(count: int | None) -> int | None:
    """Set the number of threads: in the environment until torch is imported, by a call afterwards."""
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(count)
    return count


Pre = Annotated[
    str | None,
    typer.Option(help="Name of the pre-tokenizer, for a GGUF file that names none or an unknown one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[
    str | None, typer.Option(callback=_dtype, help="Compute in fp32, bf16 or fp16 (default: as stored).")
]
Kv = Annotated[
    str, typer.Option(callback=_kv, help="Format of the KV cache: fp32, bf16, int8 or auto (the model's).")
]
Device = Annotated[
    str | None, typer.Option(callback=_device, help="cpu, cuda, cuda:1, … (default: a GPU if there is one).")
]
_THREADS_HELP = "Number of CPU threads (default: the cores this process may use)."
Threads = Annotated[
    int | None, typer.Option(min=1, max=4096, is_eager=True, callback=_threads, help=_THREADS_HELP)
]


class RunFirst(TyperGroup):
    """A group of verbs that reads ``herd eval MODEL`` as ``herd eval run MODEL``, its first verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = [*self.commands, "--help"]
        if args[0] not in known if args else not self.no_args_is_help:
            args = [known[0], *args]
        return super().parse_args(ctx, args)


@contextmanager
def progress_display(*columns: Any, show: bool = True) -> Iterator[Any]:
    """Show rich's progress bars on stderr if that is a terminal. A column that is a text is a template."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not (show and sys.stderr.isatty())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=hidden) as bar:
        yield bar


@contextmanager
def progress_bar(title: str, *, counts: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for bytes, or if it ``counts`` for things, on stderr if that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TimeRemainingColumn

    done_column = MofNCompleteColumn() if counts else DownloadColumn()
    with progress_display("{task.description}", BarColumn(), done_column, TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def checked(kind: type[S], **fields: Any) -> S:
    """Return the settings of a run. Raises `ConfigError` that names the option with the first mistake."""
    from pydantic import ValidationError

    from ..train.section import complaint

    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}={first['input']!r}: {complaint(first)}") from error


def print_json(result: Any) -> None:
    """Print one JSON document. NaN and infinity, which JSON does not have, become null.

    Characters that the output cannot encode are escaped.
    """
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(result, indent=1)
    print(text)


def picked(item: Any, names: str) -> dict[str, Any]:
    """Return the named attributes of ``item`` for JSON.

    In ``key=attribute`` the key is the name in the JSON.
    """
    pairs = (name.partition("=") for name in names.split())
    return {key: operator.attrgetter(attribute or key)(item) for key, _, attribute in pairs}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table. The first ``left`` columns are aligned left, the others right. No cell is shortened."""
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
