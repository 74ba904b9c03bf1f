"""`herd chat`: talk to a model in the terminal, see its answer as it is generated and the tools it calls.

The chat is interactive in a terminal. With -p, or if stdin is not a terminal, there is one question and one
answer. Only the answer then goes to stdout, so that it can be piped. Ctrl-C stops an answer, Ctrl-D leaves
the chat.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import ChatError, EngineError, HerdError
from ..machine import load_torch_libraries, without_garbage_collection
from ..text.messages import CODE_INTERPRETER
from ..text.toolcall import Call, Content, Malformed, Reasoning, ToolCall
from ..text.visible import visible
from ..tools import CUSTOM_TOOLS, ToolResult, execute_call
from .chat_input import marked_pastes, read_question
from .chat_progress import with_progress
from .chat_store import load_dialog, save_dialog
from .common import MODEL, Device, Dtype, Json, Kv, Pre, Threads, print_json

if TYPE_CHECKING:
    from ..engine.chat_session import ChatEvent, ChatSession
    from ..engine.constraint import Constraint
    from ..engine.engine import Engine
    from ..engine.request import Sampling
    from .chat_model import ChatModel
    from .chat_progress import Ask

HELP = "/reset forgets the dialog, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."
ENDINGS = {
    "context": "the context is full, so the answer was cut off; ask again, and the oldest turns make room",
    "length": "the answer was cut off at --max-tokens",
    "rounds": "the model kept calling tools without giving an answer, and was stopped",
    "repetition": "the answer went on repeating itself, so it was stopped; --max-repeats 0 lets it go on",
}
"""Notes to the user about answers that were stopped, by the reason."""
FORGOTTEN = "the context is full: the oldest {} of the dialog {} forgotten (the system message stays)"


def chat_command(
    folder: Annotated[str, Argument(metavar="MODEL", help=MODEL)],
    prompt: Annotated[str | None, Option("-p", "--prompt", help="Ask one question (-: from stdin).")] = None,
    system: Annotated[str | None, Option(help="System message (default: that of the training).")] = None,
    tools: Annotated[bool, Option("--tools", help="Offer Herd's tools to any model.")] = False,
    tool_call_format: Annotated[
        str | None, Option(help="Tool calls as json, builtin or function (Llama 3.1).")
    ] = None,
    lang: Annotated[str, Option(help="Language of the suggested questions.")] = "en",
    complete: Annotated[bool, Option("--complete", help="Continue text, as a base model does.")] = False,
    temperature: Annotated[float | None, Option(help="Sampling temperature (0: greedy).")] = None,
    top_p: Annotated[float | None, Option(help="Top-p sampling (1: off).")] = None,
    top_k: Annotated[int | None, Option(help="Top-k sampling (0: off).")] = None,
    min_p: Annotated[float | None, Option(help="Min-p sampling (0: off).")] = None,
    repetition_penalty: Annotated[float | None, Option(help="Penalize repetition (1: off).")] = None,
    presence_penalty: Annotated[float, Option(help="Penalize tokens that already appeared (-2 to 2).")] = 0,
    frequency_penalty: Annotated[float, Option(help="Penalize tokens for each appearance (-2 to 2).")] = 0,
    stop: Annotated[list[str] | None, Option(help="End the answer before this text. Repeatable.")] = None,
    max_tokens: Annotated[
        int | None, Option(help="Most tokens of an answer (default: all that fit).")
    ] = None,
    max_repeats: Annotated[
        int, Option(min=0, help="Stop an answer that repeats a passage so often in a row (0: never).")
    ] = 6,
    seed: Annotated[int | None, Option(help="Seed of the random numbers.")] = None,
    schema: Annotated[Path | None, Option(help="File with a JSON schema for the answers.")] = None,
    regex: Annotated[str | None, Option(help="Regular expression for whole answers.")] = None,
    context: Annotated[
        int | None, Option(min=2, help="Longest dialog in tokens (default: the model's, or what fits).")
    ] = None,
    resume: Annotated[bool, Option("--continue", help="Resume the last dialog with this model.")] = False,
    draft: Annotated[str | None, Option(help="A smaller draft model, or ngram.")] = None,
    kv: Kv = "auto",
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    pre: Pre = None,
    as_json: Json = False,
) -> None:
    """Talk to a model and see the tools it calls. With -p or input from a pipe: one question, one answer.

    The sampling options default to the checkpoint's settings, or to greedy decoding if it has none. When the
    context is full, the oldest questions and answers are dropped and a note says so; the system message is
    kept. The last dialog with each model is stored in Herd's cache folder for --continue.
    """
    constraint = _constraint(schema, regex)
    from ..checkpoint import ModelSource
    from .chat_memory import plan_context
    from .chat_model import compute_kind, load_chat_model, load_draft, require_tokenizer

    # a missing model is reported before stdin is read and before torch is imported, which takes a second
    source = ModelSource(folder, pre=pre)
    question = _one_question(prompt, as_json)
    for what, text in (("the question", question), ("--system", system)):
        if re.search("[\ud800-\udfff]", text or ""):  # bytes that Python could not decode
            raise EngineError(f"{what} is not UTF-8 text")
    with without_garbage_collection():
        load_torch_libraries()
        require_tokenizer(source)  # read meanwhile
        from ..engine.chat_session import complete as continue_text
        from ..engine.engine import Engine
        from ..engine.request import Sampling

        limit = plan_context(source, *compute_kind(source, dtype, device), kv, context)
        model = load_chat_model(source, dtype, device)
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given["repetition_penalty"] = repetition_penalty
    sampling = Sampling(
        **(model.sampling_defaults | {name: value for name, value in given.items() if value is not None}),
        max_tokens=max_tokens,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    draft_model = load_draft(draft, source, dtype, device) if draft else None
    engine = Engine(model.model, model.tokenizer, max_batch=1, max_context=limit, kv=kv, draft=draft_model)
    session = None
    if complete or model.is_base:
        ask: Ask = lambda text: continue_text(engine, text, sampling, constraint, max_repeats)  # noqa: E731
    else:
        session = _session(engine, model, sampling, system, tools, tool_call_format)
        session.constraint, session.max_repeats = constraint, max_repeats
        if resume:
            _resume(session, source.path, folder, system)
        ask = session.ask
    if resume and session is None:
        raise ChatError("--continue is for dialogs; a base model and --complete continue text")
    ask = with_progress(engine, ask)
    if question is None:
        chat = TerminalChat(model, ask, session, resume)
        about = [*model.card(engine.context), describe_sampling(sampling)]
        chat.run(lang, tool_call_format or "json", about)
        return
    if session is not None and not question.strip():
        raise EngineError("the question is empty: ask something (only a text completion may be empty)")
    try:
        _answer_once(ask(question), as_json)
        if session is not None:
            save_dialog(source.path, session.messages)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # ends the interrupted line
        raise


def _session(
    engine: Engine,
    model: ChatModel,
    sampling: Sampling,
    system: str | None,
    tools: bool,
    tool_call_format: str | None,
) -> ChatSession:
    from ..engine.chat_session import ChatSession

    known = model.tokenizer.require_chat().tool_call_formats
    if tool_call_format is not None and tool_call_format not in known:
        own = ", ".join(known) or "none, because its chat template has no place for tools"
        raise ChatError(f"--tool-call-format {tool_call_format} is unknown; this model's: {own}")
    described: list[str | dict[str, Any]] = []
    if tools and tool_call_format == "builtin":
        described = ["wolfram_alpha", CODE_INTERPRETER]
    elif tools:
        described = [tool.schema for tool in CUSTOM_TOOLS.values()]
    if system is None:
        system = "" if described else model.system_message(tool_call_format or "json")
    execute = execute_call if described or model.is_raised else None
    return ChatSession(engine, system, described, tool_call_format, execute, sampling)


def _resume(session: ChatSession, path: Path, name: str, system: str | None) -> None:
    """Put the last dialog with the model into the session.

    A system message given now replaces the old one.
    """
    stored = load_dialog(path, name)
    if system is None and stored[0]["role"] == "system":
        session.system = stored[0]["content"]
        session.reset()
    session.messages += [message for message in stored if message["role"] != "system"]


def _constraint(schema: Path | None, regex: str | None) -> Constraint | None:
    from ..engine.constraint import Constraint

    if schema is not None and regex is not None:
        raise EngineError("--schema and --regex exclude each other: give one of them")
    if regex is not None:
        return Constraint.regex(regex)
    if schema is None:
        return None
    try:
        text = schema.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"--schema {schema}: cannot be read ({error})") from None
    return Constraint.json_schema(text)


def _one_question(prompt: str | None, as_json: bool) -> str | None:
    """Return the only question, from -p or stdin, or None for an interactive chat."""

    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise EngineError("--json needs one question: give it with -p or on stdin")
        return None
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise EngineError(f"stdin is not text: byte {error.start:,} is not UTF-8") from None
    if not text.strip():
        raise EngineError("stdin is empty: pipe a question in, or give it with -p")
    return text


def _answer_once(events: Iterator[ChatEvent], as_json: bool) -> None:
    """Print the answer to stdout as it is generated, and calls, results and warnings to stderr."""
    from ..engine.chat_session import End, Forgotten

    shown = visible if sys.stdout.isatty() else str
    text = reasoning = ""
    calls: list[ToolCall] = []
    results: list[str] = []
    for event in events:
        if isinstance(event, Content):
            text += event.text
            if not as_json:
                print(shown(event.text), end="", flush=True)
        elif isinstance(event, Reasoning):
            reasoning += event.text
            if not as_json:
                print(visible(event.text), end="", flush=True, file=sys.stderr)
        elif isinstance(event, Call):
            calls.append(event.call)
        elif isinstance(event, ToolResult):
            results.append(event.content)
            if not as_json:
                _warn(f"{_written(event.call)} → {event.content}")
        elif isinstance(event, Malformed):
            _warn(f"warning: {event.reason}")
        elif isinstance(event, Forgotten):
            _warn(f"warning: {_forgotten(event.turns)}")
        elif isinstance(event, End) and as_json:
            made = [
                {"name": call.name, "arguments": call.arguments, "result": result}
                for call, result in zip_longest(calls, results)
            ]
            record = {"text": text, "calls": made, "finish_reason": event.reason, "n_tokens": event.n_tokens}
            if reasoning:
                record["reasoning"] = reasoning
            print_json(record | ({"speculated": asdict(event.speculated)} if event.speculated else {}))
            if event.reason == "repetition":
                _warn(f"warning: {ENDINGS[event.reason]}")
        elif isinstance(event, End):
            print()
            for call in calls[len(results) :]:
                _warn(f"{_written(call)} was not run")
            if event.reason in ENDINGS:
                _warn(f"warning: {ENDINGS[event.reason]}")


def _warn(line: str) -> None:
    print(visible(line), file=sys.stderr)


class TerminalChat:
    """An interactive chat. ``ask`` answers a line, ``session`` has the dialog (None for a base model)."""

    def __init__(
        self, model: ChatModel, ask: Ask, session: ChatSession | None, resumed: bool = False
    ) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, emoji=False)
        self._model, self._ask, self._session, self._resumed = model, ask, session, resumed

    def run(self, lang: str, tool_call_format: str, about: Sequence[str]) -> None:
        """Print the lines ``about`` the model, then answer line after line until the user leaves."""
        for paragraph in about:
            self._say(paragraph)
        questions = [] if self._resumed else self._suggest_questions(lang, tool_call_format)
        if self._resumed:
            self._repeat_dialog()
        self._say(HELP)
        while (line := self._read_line()) is not None and line.strip() != "/quit":
            if line.strip() == "/reset":
                if self._session is not None:
                    self._session.reset()
                    save_dialog(self._model.folder, self._session.messages)
                self._say("The dialog is forgotten.")
            elif re.fullmatch(r"\s*/\s*\w*\W?\s*|\s*/(?:reset|quit)\b.*", line):  # "/usr/bin?" is a question
                self._say(f"{line.strip()} is unknown. {HELP}")
            elif line.strip():
                if line.strip().isdecimal() and 1 <= int(line) <= len(questions):
                    line = questions[int(line) - 1]
                    self._say(line, "bold")
                self._answer(line)
                if self._session is not None:
                    save_dialog(self._model.folder, self._session.messages)

    def _repeat_dialog(self) -> None:
        """Print the questions and answers of the dialog that is resumed."""
        for message in self._session.messages if self._session else ():
            if message["role"] == "user":
                self._write(f"> {message['content']}\n", "bold")
            elif message["role"] == "assistant" and message["content"]:
                self._write(f"{message['content']}\n")

    def _suggest_questions(self, lang: str, tool_call_format: str) -> list[str]:
        if self._session is None or not self._model.is_raised:
            return []
        from .chat_questions import opening_questions

        with self._console.status("trying out the suggested questions"):
            questions, n_correct, n_tried = opening_questions(self._model, lang, tool_call_format)
        if n_tried:
            self._say(f"The model was just tried on {n_tried} questions and answered {n_correct} correctly.")
        for number, question in enumerate(questions, 1):
            self._say(f"  {number}  {question}", "none")
        if questions:
            self._say("Type a number to ask one of these, or any other question.")
        return questions

    def _read_line(self) -> str | None:
        """Return the line that the user types or the text that is pasted, or None at the end of input."""
        while True:
            try:
                return read_question("> ")
            except EOFError:
                self._console.print()
                return None
            except UnicodeDecodeError:
                self._say("The input was not UTF-8 text.")
            except KeyboardInterrupt:
                self._say("\nCtrl-D leaves.")

    def _answer(self, question: str) -> None:
        """Print an answer as it is generated. After Ctrl-C the dialog keeps the printed part."""
        from ..engine.chat_session import End, Forgotten

        line_open = False

        def note(text: str, style: str, write: Callable[[str, str], None] = self._say) -> None:
            nonlocal line_open
            if line_open:
                self._console.print()
            write(text, style)
            line_open = False

        with marked_pastes(), contextlib.closing(self._ask(question)) as events:
            try:
                for event in events:
                    if isinstance(event, Content | Reasoning):
                        self._write(event.text, "dim" if isinstance(event, Reasoning) else "none")
                        line_open = not event.text.endswith("\n")
                    elif isinstance(event, Call):
                        note(f"calls {_written(event.call)}\n", "cyan", self._write)
                    elif isinstance(event, ToolResult):
                        sign, style = ("→", "green") if event.ok else ("✗", "red")
                        note(f"  {sign} {event.content}\n", style, self._write)
                    elif isinstance(event, Malformed):
                        note(event.reason, "yellow")
                    elif isinstance(event, Forgotten):
                        note(_forgotten(event.turns), "yellow")
                    elif isinstance(event, End) and event.reason in ENDINGS:
                        note(ENDINGS[event.reason], "yellow")
            except KeyboardInterrupt:
                line_open = True  # the terminal shows ^C
                note("stopped", "yellow")
            except HerdError as error:
                note(f"error: {error}", "red")
        if line_open:
            self._console.print()

    def _say(self, text: str, style: str = "dim") -> None:
        """Print a line of Herd's own, wrapped at words."""
        self._console.print(visible(text), style=style)

    def _write(self, text: str, style: str = "none") -> None:
        """Write a part of the dialog as it is: rich would wrap lines and expand tabs."""
        from rich.segment import Segment, Segments

        segment = Segment(visible(text), self._console.get_style(style))
        self._console.print(Segments([segment]), end="", soft_wrap=True)
        self._console.file.flush()


def describe_sampling(sampling: Sampling) -> str:
    """Return a line about how tokens are chosen, and how to change it."""
    if sampling.greedy:
        return "The most likely token is always chosen; --temperature 0.7 gives varied answers."
    values = [("temperature", sampling.temperature, 0), ("top_p", sampling.top_p, 1)]
    values += [("top_k", sampling.top_k, 0), ("min_p", sampling.min_p, 0)]
    values += [("repetition_penalty", sampling.repetition_penalty, 1)]
    named = ", ".join(f"{name} {value:g}" for name, value, off in values if value != off)
    return f"Tokens are drawn with {named}; --temperature 0 always chooses the most likely one."


def _forgotten(turns: int) -> str:
    return FORGOTTEN.format("turn" if turns == 1 else f"{turns} turns", "was" if turns == 1 else "were")


def _written(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"
