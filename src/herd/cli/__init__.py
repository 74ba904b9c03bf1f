"""The command ``herd``: one file a verb (or two that belong together), each thin: parse, call, print.

`herd --help` must answer at once, and importing torch alone takes a second, so this file knows of every verb only its
name, one line of help and the module that holds it; the module is imported when the verb is called. Modules expose a
typed function (typer reads its signature), named in the table.

Exit codes: 0 done; 1 an error of the input or the machine, one line on stderr; 2 wrong usage; 130 stopped by Ctrl-C.
A traceback means a bug; HERD_DEBUG=1 shows one for every error.
"""

from __future__ import annotations

import errno
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import HerdError


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: ``function`` of module ``herd.cli.<module>``; ``resume`` is what to add to the same
    command to go on after Ctrl-C ("" if nothing), None where there is nothing to go on with."""

    module: str
    help: str
    function: str = "command"
    resume: str | None = None


VERBS: dict[str, Verb] = {
    "raise": Verb(
        "raise_", "Raise a family from text: teacher, instruct model, students.", resume="--resume"
    ),
    "chat": Verb("chat", "Talk to a model; see the tools it calls."),
    "train": Verb("train", "Train by a recipe (YAML); the same command resumes.", resume=""),
    "quantize": Verb("quantize", "Make a model smaller: 8 or 4 bits a weight.", resume=""),
    "import": Verb("convert", "Bring in weights: Meta, Hugging Face, GGUF.", "import_command", resume=""),
    "export": Verb("convert", "Write a checkpoint for other tools.", "export_command", resume=""),
    "report": Verb("report", "Write the page of a run anew."),
    "eval": Verb("eval", "Benchmarks for any checkpoint, and how sure each number is.", "app", resume=""),
    "bench": Verb("bench", "How fast a model runs here, beside the memory's own speed."),
    "sizes": Verb("sizes", "The published models: parameters, bytes, KV cache."),
    "plan": Verb("plan", "What fits, how fast, what it costs: beforehand.", "app"),
}


class _LazyCommand(TyperCommand):
    """Stands for a verb in the help and hands over to the real command once the verb is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return load_verb(self.name or "").make_context(info_name, args, parent=parent, **extra)


class _InOrder(TyperGroup):
    """Lists the verbs in the order of the table: the order of a model's life."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def load_verb(name: str) -> Any:
    """The real command of a verb, its module imported."""
    verb = VERBS[name]
    function = getattr(importlib.import_module(f".{verb.module}", __name__), verb.function)
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(function)
    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"herd {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    """The whole life of a Llama, from text to a model that talks. Start with: herd raise"""


def build() -> Any:
    """The whole command, without importing any verb."""
    app = typer.Typer(cls=_InOrder, add_completion=False, no_args_is_help=True, rich_markup_mode=None)
    app.callback()(_root)
    for name, verb in VERBS.items():
        app.command(name, cls=_LazyCommand, help=verb.help)(lambda: None)
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``herd``: runs the verb and leaves with its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warn
    sys.exit(run(args))


def run(args: list[str]) -> int:
    """Run one command line; returns the exit code, with every foreseen error printed as one line."""
    try:
        code = build()(args, prog_name="herd", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except HerdError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _closed_pipe()
        if error.errno is None:  # not from the system but from a library: a bug until shown otherwise
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have one
            raise
        usage = getattr(error, "ctx", None)
        print(error.format_message(), file=sys.stderr) if usage is None else error.show()  # type: ignore[attr-defined]
        return int(getattr(error, "exit_code", 2))
    code = code if isinstance(code, int) else 0
    if code == 130:
        print(_stopped(args), file=sys.stderr)
    return code


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Warnings are for the user: the sentence, not the line of code it comes from."""
    print(f"warning: {message}", file=sys.stderr)


def _fail(line: str, code: int = 1) -> int:
    if os.environ.get("HERD_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"error: {line}", file=sys.stderr)
    return code


def _stopped(args: list[str]) -> str:
    verb = VERBS.get(args[0]) if args else None
    if verb is None or verb.resume is None:
        return "stopped"
    again = ["herd", *args, *([verb.resume] if verb.resume and verb.resume not in args else [])]
    return f"stopped; resume with: {shlex.join(again)}"


def _closed_pipe() -> int:
    """The reader went away (``herd sizes | head -1``): nothing more to say, not even when Python flushes at exit."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    return 141  # 128 + SIGPIPE, as the shell would report it
