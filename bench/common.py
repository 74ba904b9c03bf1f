"""Code that all bench scripts share: the real data, the options, and the location of receipts.

A bench writes to ``runs/receipts/``, which git ignores, so that measuring does not change the sources of the README
and docs/checks.md are generated from. With ``--commit`` the receipt replaces the committed one in
``bench/receipts/``, and `make readme` then rewrites the tables. Such a receipt names a commit, so ``--commit`` is refused
while tracked source has changes that are in no commit.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from herd import machine
from herd.report import Value, write_receipt
from herd.report.receipt import git_commit, read_receipt

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("HERD_TEST_DATA", ROOT.parent / "shared" / "data"))
WORK = Path.home() / ".cache" / "herd" / "bench"
"""Where benches keep large files and half-finished work between calls."""
COMMITTED, UNCOMMITTED = ROOT / "bench" / "receipts", ROOT / "runs" / "receipts"
STARTED_FROM = git_commit(ROOT)
"""The commit from which this process took its code: a later one can be checked out before the bench ends."""


class Commit(argparse.Action):
    """``--commit``, refused at the start if the receipt could not name the code that it measured."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        if STARTED_FROM["dirty"]:
            parser.error(
                "--commit: tracked source has changes, and a receipt names a commit: commit first (git status)"
            )
        namespace.commit = True


def bench_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring and which knows ``--commit``."""
    machine.keep_freed_memory()  # as the command line does
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commit(parser)
    return parser


def run_row(
    doc: str | None, rows: Mapping[str, Callable[[argparse.Namespace], None]], *, limit: str, work: Path
) -> None:
    """Run the row of a bench that the command line names. ``limit`` is the help of ``--limit``."""
    import torch

    parser = bench_parser(doc)
    parser.add_argument("row", choices=rows)
    parser.add_argument("--limit", type=int, help=limit)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--work", type=Path, default=work)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows[args.row](args)


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Add ``--commit`` to a parser or to one of its verbs."""
    text = "write the receipt to bench/receipts, where the README's numbers come from, not to runs/receipts"
    parser.add_argument("--commit", action=Commit, nargs=0, default=False, help=text)


def receipt_path(name: str, *, commit: bool) -> Path:
    """Return where the receipt ``name`` is written."""
    return (COMMITTED if commit else UNCOMMITTED) / f"{name}.json"


def run_quietly(command: Sequence[str], seconds: float | None = None) -> int | None:
    """Run a command without its output, and return its exit code. None: it was killed after so many seconds.

    SIGKILL goes to its whole process group.
    """
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def at_most(
    bar: float, value: float, unit: str, lo: float | None = None, hi: float | None = None, *, shown: str = ""
) -> Value:
    """Return a value that must be at most ``bar``, which the receipt names as ``shown`` if that is given."""
    return Value(value, unit, lo, hi, shown or f"≤ {bar:,g}", value <= bar)


def at_least(bar: float, value: float, unit: str, lo: float | None = None, hi: float | None = None) -> Value:
    """Return a value that must be at least ``bar``."""
    return Value(value, unit, lo, hi, f"≥ {bar:,g}", value >= bar)


def exactly(wanted: int, value: int, unit: str, *, shown: str = "") -> Value:
    """Return a value that must be ``wanted``."""
    return Value(value, unit, bar=shown or f"= {wanted}", passed=value == wanted)


def save_receipt(
    name: str,
    *,
    what: str,
    values: Mapping[str, Value | tuple[Any, str]],
    commit: bool | None = None,
    **more: Any,
) -> Path:
    """Write a receipt, print its values with their verdicts and its path, and return the path.

    It is committed if the command line has ``--commit``, unless ``commit`` says otherwise. The command that it names
    is the one that runs now, without that option. With ``HERD_ISA`` the name ends with that instruction set: an older
    one, measured on this processor. ``more``: seed, rivals, notes.
    """
    commit = "--commit" in sys.argv if commit is None else commit
    words = [word for word in sys.argv[1:] if word != "--commit"]
    command = shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])
    if isa := os.environ.get("HERD_ISA"):
        rivals = f" HERD_RIVALS={Path(os.environ['HERD_RIVALS']).name}" if "HERD_RIVALS" in os.environ else ""
        name, command = f"{name}-{isa}", f"HERD_ISA={isa}{rivals} {command}"
    path = receipt_path(name, commit=commit)
    made_by = STARTED_FROM | {"dirty": STARTED_FROM["dirty"] or git_commit(ROOT)["dirty"]}
    write_receipt(path, what=what, values=values, command=command, made_by=made_by, **more)
    print(lines(read_receipt(path).values))
    print(path, flush=True)
    return path


def lines(values: Mapping[str, Value]) -> str:
    """Return the values as a terminal shows them: one line each, with the bar and whether it was reached."""

    def line(key: str, value: Value) -> str:
        number = f"{value.value:.5g}" if isinstance(value.value, int | float) else value.value
        verdict = "" if value.passed is None else f"   ({value.bar}) {'passed' if value.passed else 'FAILED'}"
        return f"{key}: {number} {value.unit}{verdict}"

    return "\n".join(line(key, value) for key, value in values.items())
