"""A dialog with a model: keeps the messages, streams the answer, runs the tools it calls, goes on with their results.

Everything a viewer could want to show comes as an event, in order: pieces of text, a call, its result, the end. What
tools *are* is the caller's business: a `ToolCall` goes to ``execute`` and text comes back. The dialog stays valid
whatever happens: an interrupted answer is kept as far as it came, a question without any answer is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineError
from ..text.chat import render
from ..text.toolcall import Call, Content, Event, Malformed, ToolCall, ToolCallParser
from ..tools.loop import answer_call
from .constraint import Constraint
from .engine import Engine
from .request import FinishReason, Request, Sampling, Speculated

Execute = Callable[[ToolCall], tuple[str, bool]]
"""Runs a call: what the model is to read, and whether it worked. See `run_tool`."""

MAX_ROUNDS = 5


def run_tool(call: ToolCall) -> tuple[str, bool]:
    """Runs what is in `herd.tools`, code in its sandbox. A failure is told to the model as well."""
    return answer_call(call.name, call.arguments)


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Calling:
    """The model calls a tool."""

    call: ToolCall


@dataclass(frozen=True)
class Result:
    """What the tool gave; ``ok`` False where it failed and ``content`` says why."""

    call: ToolCall
    content: str
    ok: bool


@dataclass(frozen=True)
class Problem:
    """The model meant to call a tool and did not manage to; its text was shown as text."""

    reason: str


@dataclass(frozen=True)
class End:
    """The answer is over. ``reason`` "rounds": it kept calling tools and was stopped after `MAX_ROUNDS`."""

    reason: FinishReason | str
    n_tokens: int
    context_used: int
    context: int
    speculated: Speculated | None = None


ChatEvent = Text | Calling | Result | Problem | End


@dataclass
class ChatSession:
    """A dialog with a model, and the settings of its answers.

    ``system`` is the system message. ``tools`` are schemas or names of built-in tools, which the renderer describes
    to the model, and ``tool_call_format`` is how calls are written. ``execute`` runs a call; with tools but without
    ``execute``, calls are reported and not run. With neither, and under a ``constraint``, every answer is plain
    text, whatever it looks like.
    """

    engine: Engine
    system: str = ""
    tools: Sequence[str | dict[str, Any]] = ()
    tool_call_format: str = "json"
    execute: Execute | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=None))
    date: str | None = None
    constraint: Constraint | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.engine.tokenizer is None:
            raise EngineError("chat needs a tokenizer, and this model has none")
        self.engine.tokenizer.require_chat_format()
        self.reset()

    def reset(self) -> None:
        """Forget the dialog."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Iterator[ChatEvent]:
        """Answer ``question``. Raises EngineError, and leaves the dialog as it was, when the context is full.

        Closing the iterator, or an exception such as Ctrl-C inside it, ends the answer where it is.
        """
        before = len(self.messages)
        self.messages.append({"role": "user", "content": question})
        try:
            yield from self._rounds()
        except EngineError:
            del self.messages[before:]
            raise
        finally:
            if len(self.messages) == before + 1:  # nothing came
                del self.messages[before:]

    def _rounds(self) -> Iterator[ChatEvent]:
        n_tokens, guesses = 0, None
        for _ in range(MAX_ROUNDS):
            ids = self._prompt()
            request = Request(ids, self.sampling, constraint=self.constraint)
            turn = _Turn(self.engine, request, find_calls=self._offers_tools and self.constraint is None)
            try:
                yield from turn.events()
            finally:  # also when interrupted: keep what was said
                turn.cancel()
                if turn.content or turn.calls:
                    self.messages.append(turn.message())
            n_tokens += turn.n_tokens
            guesses = turn.guesses if guesses is None or turn.guesses is None else guesses + turn.guesses
            if not turn.calls or self.execute is None or turn.reason != "stop":
                yield End(turn.reason, n_tokens, len(ids) + turn.n_tokens, self.engine.context, guesses)
                return
            for call in turn.calls:
                content, ok = self.execute(call)
                self.messages.append({"role": "ipython", "content": content})
                yield Result(call, content, ok)
        yield End("rounds", n_tokens, len(self._prompt()), self.engine.context, guesses)

    @property
    def _offers_tools(self) -> bool:
        """Whether the model was offered any tools. Without them, an answer that looks like a call is an answer."""
        return bool(self.tools) or self.execute is not None

    def _prompt(self) -> list[int]:
        assert self.engine.tokenizer is not None
        tools = list(self.tools) or None
        rendered = render(
            self.messages,
            self.engine.tokenizer,
            tools=tools,
            tool_call_format=self.tool_call_format,
            generation_prompt=True,
            date=self.date,
        )
        if len(rendered.ids) >= self.engine.context:
            raise EngineError(
                f"the dialog has {len(rendered.ids)} tokens and the model's context holds {self.engine.context}: "
                "start anew (/reset) or ask something shorter"
            )
        return rendered.ids


class _Turn:
    """One message of the assistant as it comes."""

    def __init__(self, engine: Engine, request: Request, *, find_calls: bool) -> None:
        self._stream = engine.submit(request)
        self._parser = ToolCallParser() if find_calls else None
        self.content, self.calls, self.n_tokens = "", list[ToolCall](), 0
        self.reason: FinishReason = "cancelled"
        self.guesses: Speculated | None = None

    def events(self) -> Iterator[ChatEvent]:
        for delta in self._stream:
            self.n_tokens += len(delta.token_ids)
            self.reason = delta.finish_reason or self.reason
            self.guesses = delta.speculated
            if self._parser is not None:
                yield from self._take(self._parser.feed(delta.text))
            elif delta.text:
                yield from self._take([Content(delta.text)])
        if self._parser is not None:
            yield from self._take(self._parser.finish())

    def cancel(self) -> None:
        self._stream.cancel()

    def message(self) -> dict[str, Any]:
        calls = [
            {"name": c.name, "arguments": c.arguments, "tool_call_format": c.tool_call_format}
            for c in self.calls
        ]
        return {"role": "assistant", "content": self.content} | ({"tool_calls": calls} if calls else {})

    def _take(self, events: list[Event]) -> Iterator[ChatEvent]:
        for event in events:
            if isinstance(event, Content):
                self.content += event.text
                yield Text(event.text)
            elif isinstance(event, Call):
                self.calls.append(event.call)
                yield Calling(event.call)
            elif isinstance(event, Malformed):
                yield Problem(event.reason)


def complete(
    engine: Engine, prompt: str, sampling: Sampling, constraint: Constraint | None = None
) -> Iterator[ChatEvent]:
    """A base model's way: the text goes on. The same events, without calls."""
    if engine.tokenizer is None:
        raise EngineError("completion needs a tokenizer, and this model has none")
    ids = engine.tokenizer.encode(prompt, bos=True)
    stream = engine.submit(Request(ids, sampling, constraint=constraint))
    n_tokens = 0
    reason: FinishReason = "cancelled"
    guesses: Speculated | None = None
    try:
        for delta in stream:
            n_tokens += len(delta.token_ids)
            reason, guesses = delta.finish_reason or reason, delta.speculated
            if delta.text:
                yield Text(delta.text)
    finally:
        stream.cancel()
    yield End(reason, n_tokens, len(ids) + n_tokens, engine.context, guesses)
