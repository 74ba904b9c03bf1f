"""The command ``herd``: one file per verb or group of verbs.

A verb's function parses its options, calls a package of `herd` that does the work, and prints the result.

`herd --help` must answer at once, and importing torch alone takes a second. So this file knows only the name
of each verb, one line of help, and the module and function to import when the verb is called.

Exit codes: 0 for success, 1 for an error in the input or of the machine (one line on stderr), 2 for wrong
usage, 130 for Ctrl-C. A traceback means a bug in Herd. ``HERD_DEBUG=1`` shows one for every error.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import machine
from ..errors import HerdError


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: ``function`` in the module ``herd.cli.<module>``.

    ``resume`` is the option that resumes the same command after Ctrl-C. It is "" if the command resumes by
    itself, and None if it cannot be resumed.
    """

    module: str
    help: str
    function: str
    resume: str | None = None


VERBS: dict[str, Verb] = {  # in the order of the help text
    "pull": Verb("models", "Download a model by name.", "pull_command", resume=""),
    "list": Verb("models", "List the models on this disk and the known names.", "list_command"),
    "rm": Verb("models", "Delete a downloaded model.", "remove_command"),
    "raise": Verb("raise_", "Train a small family of models from text.", "raise_command", resume="--resume"),
    "chat": Verb("chat", "Talk to a model in the terminal.", "chat_command"),
    "serve": Verb("serve", "Serve models: OpenAI's, Anthropic's, Ollama's API.", "serve_command"),
    "train": Verb("train", "Train a model as a recipe (YAML) says.", "train_command", resume=""),
    "shrink": Verb("shrink", "Make a smaller student of a model by distillation.", "app", resume=""),
    "tune": Verb("tune", "Fine-tune a model on your files, and merge the result.", "app", resume=""),
    "synth": Verb("synth", "Make verified training data with a teacher.", "synth_command", resume=""),
    "quantize": Verb("quantize", "Store a model in 2 to 8 bits per weight.", "quantize_command", resume=""),
    "import": Verb("convert", "Import weights: Meta, Hugging Face, GGUF.", "import_command", resume=""),
    "export": Verb("convert", "Export a checkpoint for other programs.", "export_command", resume=""),
    "eval": Verb("eval", "Evaluate a model or an endpoint on benchmarks.", "app", resume=""),
    "keys": Verb("keys", "Manage keys, budgets and prices of `herd serve`.", "app"),
    "bench": Verb("bench", "Measure the speed of a model on this machine.", "bench_command"),
    "plan": Verb("plan", "Predict memory, speed and cost before you start.", "app"),
    "report": Verb("report", "Write a run's report page again.", "report_command"),
    "sizes": Verb("sizes", "List the published models and their sizes.", "sizes_command"),
}


TEXT_OPTIONS = {"-p", "--prompt", "--system", "--stop", "--regex"}
"""Options whose values are any text and never a path."""


class _LazyCommand(TyperCommand):
    """A verb as the help text shows it. The real command is loaded once it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return load_verb(self.name or "").make_context(info_name, args, parent=parent, **extra)


def load_verb(name: str) -> Any:
    """Import the module of a verb and return its command."""
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Chat, serve, measure, shrink, tune and train models of the Llama family.

    Start with: herd chat smollm2
    """


def build() -> Any:
    """Return the command with all verbs, without importing their modules."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    app.callback()(_root)
    for name, verb in VERBS.items():
        app.command(name, cls=_LazyCommand, help=verb.help)(lambda: None)
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by ">&-"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    warnings.showwarning = _print_warning
    machine.limit_spinning()
    machine.keep_freed_memory()
    if (cores := machine.cores()) < (os.cpu_count() or 1):  # a container's quota, which torch does not see
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    code = run([_utf8(word) for word in (sys.argv[1:] if argv is None else argv)])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end of Python may wait for threads: Ctrl-C ends that
    sys.exit(code)


def _utf8(word: str) -> str:
    """Return an argument that Python could not decode in this locale as UTF-8, if it is that."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word  # for example a file's name in another encoding


def _expand_home(args: list[str]) -> list[str]:
    """Replace a ``~`` at the beginning of paths. A shell does not, within quotes and after ``--out=``."""
    expanded = []
    for before, word in zip(["", *args], args, strict=False):
        option, value = word.split("=", 1) if re.match(r"--[\w-]+=", word) else ("", word)
        if re.match(r"~(/|$)", value) and not {before, option} & TEXT_OPTIONS:
            value = os.path.expanduser(value)
        expanded.append(f"{option}={value}" if option else value)
    return expanded


def run(args: list[str]) -> int:
    """Run one command line and return its exit code. Every foreseen error is printed as one line."""
    args = _expand_home(args)
    try:
        code = build()(args, prog_name="herd", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except HerdError as error:
        return _print_error(str(error), error.exit_code)
    except ModuleNotFoundError as error:  # of an extra, such as fastapi
        package = (error.name or "herd").partition(".")[0]
        if package == "herd":
            raise
        cure = f"run make setup, or pip install {package}"
        return _print_error(f"the package {package} is not installed: {cure}")
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _stop_writing()
        if error.errno is None:  # raised by a library, not by the system: show it as a bug
            raise
        return _print_error(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have one
            raise
        usage: Any = error
        if getattr(usage, "ctx", None):
            usage.show()
        else:
            print(usage.format_message(), file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    code = code if isinstance(code, int) else 0
    if code == 130:
        print(_stopped_message(args), file=sys.stderr)
    return code


def _print_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning without the line of code that raised it, because that means nothing to a user."""
    print(f"warning: {message}", file=sys.stderr)


def _print_error(line: str, code: int = 1) -> int:
    if os.environ.get("HERD_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"error: {line}", file=sys.stderr)
    return code


def _stopped_message(args: list[str]) -> str:
    verb = VERBS.get(args[0]) if args else None
    if verb is None or verb.resume is None:
        return "stopped"
    again = ["herd", *args, *([verb.resume] if verb.resume and verb.resume not in args else [])]
    return f"stopped; to resume: {shlex.join(again)}"


def _stop_writing() -> int:
    """Discard the rest of the output, because its reader has closed the pipe. Python writes at exit too."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    return 141  # 128 + SIGPIPE, as a shell reports it
