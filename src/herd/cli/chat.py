"""`herd chat`: talk to a model in the terminal, see its words as they come and the tools it calls.

Interactive where there is a terminal; otherwise, or with -p, one question and one answer, which alone goes to stdout so
that it can be piped. Ctrl-C stops an answer, not the program; Ctrl-D leaves.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.chat_session import ChatEvent, ChatSession, End
    from ..engine.constraint import Constraint
    from ..engine.engine import Engine
    from ..engine.request import Sampling
    from ..text.toolcall import ToolCall
    from .chat_model import Talker

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = "/reset forgets the dialog, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def chat_command(
    folder: Annotated[
        str, typer.Argument(help="A checkpoint folder, e.g. runs/demo/instruct, or hf:ORG/NAME.")
    ],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Ask this one thing; - reads it from stdin.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message; default: what the model was trained with.")
    ] = None,
    tools: Annotated[
        bool, typer.Option("--tools", help="Describe Herd's tools to a model from elsewhere.")
    ] = False,
    tool_call_format: Annotated[
        str, typer.Option(help="How calls are written: json, builtin or function.")
    ] = "json",
    lang: Annotated[str, typer.Option(help="Language of the opening questions.")] = "en",
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue text, as a base model does.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep this many of the most likely tokens; 0: all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Keep tokens at least this fraction as likely as the most likely one; 0: all."),
    ] = None,
    repetition: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repetition; 1: off.")
    ] = None,
    presence: Annotated[float, typer.Option("--presence-penalty", help="Off tokens that came, -2 to 2.")] = 0,
    frequency: Annotated[
        float, typer.Option("--frequency-penalty", help="The same for every time they came.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be given again.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default: to the end of the context.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same answers again, with a temperature.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema: every answer is JSON that it accepts.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Every answer is text that this matches as a whole.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Guess ahead with this smaller model's folder, or with: ngram.")
    ] = None,
    kv: Annotated[
        str, typer.Option(help="What keys and values are kept in: bf16, int8, fp32 or auto.")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to a model; see the tools it calls. One question with -p or from stdin; otherwise a dialog."""
    constraint = _constraint(schema, regex)
    from ..checkpoint import resolve_folder
    from ..engine.engine import Engine
    from ..engine.memory import require_kind
    from ..engine.request import Sampling
    from ..errors import EngineError
    from .chat_model import open_draft, open_model

    require_kind(kv)
    if not folder.startswith("hf:"):
        resolve_folder(folder)  # what is not there is said before a question is asked for
    once = _once(prompt, as_json)
    talker = open_model(folder, dtype, device)
    asked = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition,
    }
    sampling = Sampling(
        **(talker.defaults | {name: value for name, value in asked.items() if value is not None}),
        max_tokens=max_tokens,
        presence_penalty=presence,
        frequency_penalty=frequency,
        stop=tuple(stop or ()),
        seed=seed,
    )
    guesser = open_draft(draft, talker, dtype, device) if draft else None
    engine = Engine(talker.model, talker.tokenizer, max_batch=1, kv=kv, draft=guesser)
    if complete or talker.base:
        speaker: Speaker = Completer(engine, sampling, constraint)
    else:
        session = _session(engine, talker, sampling, system, tools, tool_call_format)
        session.constraint = constraint
        speaker = Dialog(session)
    if once is not None and not once.strip() and isinstance(speaker, Dialog):
        raise EngineError(
            "the question is empty: ask something (a base model, or --complete, may begin from nothing)"
        )
    if once is not None:
        _answer_once(speaker, once, as_json)
    else:
        _converse(speaker, talker, lang, tool_call_format)


# Who answers: a base model's continuation, or a dialog. Both give the same events.


class Completer:
    """Each text is continued by itself."""

    def __init__(self, engine: Engine, sampling: Sampling, constraint: Constraint | None = None) -> None:
        self._engine, self._sampling, self._constraint = engine, sampling, constraint

    def ask(self, text: str) -> Iterator[ChatEvent]:
        from ..engine.chat_session import complete

        return complete(self._engine, text, self._sampling, self._constraint)

    def reset(self) -> None:
        """Nothing is kept."""


class Dialog:
    """A dialog with tools."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session

    def ask(self, text: str) -> Iterator[ChatEvent]:
        return self.session.ask(text)

    def reset(self) -> None:
        self.session.reset()


Speaker = Completer | Dialog


def _session(
    engine: Engine, talker: Talker, sampling: Sampling, system: str | None, tools: bool, tool_call_format: str
) -> ChatSession:
    from ..engine.chat_session import ChatSession
    from ..errors import ChatError
    from ..text.chat import CODE_INTERPRETER, TOOL_CALL_FORMATS
    from ..tools import CUSTOM_TOOLS, execute_call

    if tool_call_format not in TOOL_CALL_FORMATS:
        raise ChatError(
            f"--tool-call-format {tool_call_format} is unknown: use one of {', '.join(TOOL_CALL_FORMATS)}"
        )
    described: list[str | dict[str, Any]] = []
    if tools:
        described = (
            ["wolfram_alpha", CODE_INTERPRETER]
            if tool_call_format == "builtin"
            else [t.schema for t in CUSTOM_TOOLS.values()]
        )
    offered = bool(described) or talker.raised
    system = ("" if described else talker.system(tool_call_format)) if system is None else system
    return ChatSession(
        engine, system, described, tool_call_format, execute_call if offered else None, sampling
    )


def _constraint(schema: Path | None, regex: str | None) -> Constraint | None:
    """What answers must be. Read before anything is loaded."""
    from ..engine.constraint import Constraint
    from ..errors import EngineError

    if schema is not None and regex is not None:
        raise EngineError("--schema and --regex exclude each other: give one of them")
    if regex is not None:
        return Constraint.regex(regex)
    if schema is None:
        return None
    try:
        text = schema.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"--schema {schema}: unreadable ({error})") from None
    return Constraint.json_schema(text)


def _once(prompt: str | None, as_json: bool) -> str | None:
    """The one question, or None for a dialog. Read before anything is loaded."""
    from ..errors import EngineError

    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise EngineError("--json needs one question: give it with -p or on stdin")
        return None
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise EngineError(f"stdin is not text: byte {error.start:,} is no UTF-8") from None
    if not text:
        raise EngineError("stdin is empty: pipe a question in, or give it with -p")
    return text


def _answer_once(speaker: Speaker, question: str, as_json: bool) -> None:
    """The answer to stdout as it comes; calls, results and warnings to stderr."""
    from ..engine.chat_session import Calling, End, Problem, Text
    from ..tools import ToolResult

    shown = visible if sys.stdout.isatty() else str
    text = ""
    calls: list[dict[str, Any]] = []
    waiting: list[ToolCall] = []
    for event in _closing_line(speaker.ask(question)):
        if isinstance(event, Text):
            text += event.text
            if not as_json:
                print(shown(event.text), end="", flush=True)
        elif isinstance(event, Calling):
            waiting.append(event.call)
        elif isinstance(event, ToolResult):
            waiting.remove(event.call)
            calls.append(
                {"name": event.call.name, "arguments": event.call.arguments, "result": event.content}
            )
            if not as_json:
                print(visible(f"{_written(event.call)} → {event.content}"), file=sys.stderr)
        elif isinstance(event, Problem):
            print(visible(f"warning: {event.reason}"), file=sys.stderr)
        elif isinstance(event, End):
            not_run = [{"name": call.name, "arguments": call.arguments, "result": None} for call in waiting]
            if as_json:
                result = {
                    "text": text,
                    "calls": calls + not_run,
                    "finish_reason": event.reason,
                    "n_tokens": event.n_tokens,
                }
                print_json(result | ({"speculated": asdict(event.speculated)} if event.speculated else {}))
            else:
                print()
                for call in waiting:
                    print(visible(f"{_written(call)} was not run"), file=sys.stderr)
                if note := _ending(event):
                    print(f"warning: {note}", file=sys.stderr)


def _closing_line(events: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
    """The events; where Ctrl-C cuts a line short, it is closed before anybody says so."""
    try:
        yield from events
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise


def _converse(speaker: Speaker, talker: Talker, lang: str, tool_call_format: str) -> None:
    from rich.console import Console

    from ..errors import HerdError
    from .chat_model import opening_questions

    console = Console(highlight=False, markup=False, emoji=False)
    for about in talker.card():
        console.print(about, style="dim")
    questions: list[str] = []
    if isinstance(speaker, Dialog) and talker.raised:
        with console.status("trying the opening questions"):
            questions, n_right, n_tried = opening_questions(talker, lang, tool_call_format)
        if n_tried:
            console.print(
                f"It was just tried on {n_tried} questions and answered {n_right} rightly.", style="dim"
            )
        for number, question in enumerate(questions, 1):
            console.print(f"  {number}  {question}")
        if questions:
            console.print("Type a number to ask one of these, or anything of your own.", style="dim")
    console.print(HELP, style="dim")
    while True:
        line = _read(console)
        if line is None or line == "/quit":
            break
        if line == "/reset":
            speaker.reset()
            console.print("The dialog is forgotten.", style="dim")
        elif line.startswith("/"):
            console.print(f"{line.split()[0]} is unknown. {HELP}", style="dim")
        elif line.strip():
            if line.strip().isdecimal() and 1 <= int(line) <= len(questions):
                line = questions[int(line) - 1]
                console.print(line, style="bold")
            try:
                _show(console, speaker.ask(line))
            except HerdError as error:
                console.print(f"error: {error}", style="red")


def _read(console: Console) -> str | None:
    """A line of the user's; None at the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history for input())
    while True:
        try:
            return input("> ")
        except EOFError:
            console.print()
            return None
        except UnicodeDecodeError:
            console.print("That was not text.", style="dim")
        except KeyboardInterrupt:
            console.print("\nCtrl-D leaves.", style="dim")


def _show(console: Console, events: Iterator[ChatEvent]) -> None:
    """Print an answer as it comes. Ctrl-C ends it where it is; the dialog keeps what was said."""
    from ..engine.chat_session import Calling, End, Problem, Text
    from ..tools import ToolResult

    line_open = False

    def aside(text: str, style: str) -> None:
        nonlocal line_open
        console.print(("\n" if line_open else "") + visible(text), style=style, soft_wrap=True)
        line_open = False

    try:
        for event in events:
            if isinstance(event, Text):
                console.file.write(visible(event.text))  # rich would expand tabs and drop control characters
                console.file.flush()
                line_open = not event.text.endswith("\n")
            elif isinstance(event, Calling):
                aside(f"calls {_written(event.call)}", "cyan")
            elif isinstance(event, ToolResult):
                aside(f"  {'→' if event.ok else '✗'} {event.content}", "green" if event.ok else "red")
            elif isinstance(event, Problem):
                aside(event.reason, "yellow")
            elif isinstance(event, End) and (note := _ending(event)):
                aside(note, "yellow")
    except KeyboardInterrupt:
        aside("stopped", "yellow")
    finally:
        if hasattr(events, "close"):
            events.close()
    if line_open:
        console.print()


def visible(text: str) -> str:
    """Return ``text`` with control characters spelled out (``\\x1b``), except line breaks and tabs.

    A model's text could otherwise move the cursor, change colours or retitle the terminal's window.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _written(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def _ending(end: End) -> str:
    """What the user must know of how the answer ended; nothing where it simply ended."""
    if end.reason == "context":
        return f"the context of {end.context:,} tokens is full: the answer was cut here; /reset starts anew"
    if end.reason == "length":
        return f"cut after {end.n_tokens} tokens, as --max-tokens asks"
    if end.reason == "rounds":
        return "it kept calling tools without an answer, and was stopped"
    return ""
