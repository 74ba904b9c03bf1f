"""Hold a dialog with a model: keep the messages, stream the answer and run the tools that it calls.

An answer is a series of events: pieces of text, calls, their results, and the end. The caller chooses how
calls are run (`Execute`). The dialog always stays valid: of an interrupted answer the part that was generated
is kept, and a question without any answer is removed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ..errors import EngineError
from ..text.answers import AnswerParser
from ..text.messages import tool_schema
from ..text.toolcall import Content, Event, Parsed
from ..tools.loop import Execute, ToolLoop, ToolResult
from .constraint import Constraint
from .engine import Engine
from .repetition import RepetitionWatch
from .request import FinishReason, Request, Sampling, Speculated

MAX_ROUNDS = 5
MAX_REPEATS = 6
"""Copies of one passage in a row after which an answer is stopped."""
ANSWER_TOKENS = 1024
"""Tokens kept free for an answer by forgetting the oldest turns. In a small context, a quarter of it."""


@dataclass(frozen=True)
class End:
    """The end of the answer.

    ``reason`` "rounds": the model called tools until it was stopped. "repetition": it repeated one passage
    until it was stopped.
    """

    reason: FinishReason | str
    n_tokens: int
    context_used: int
    context: int
    speculated: Speculated | None = None


@dataclass(frozen=True)
class Forgotten:
    """The oldest ``turns`` (a question and its answer) were removed because the context was full."""

    turns: int


ChatEvent = Event | ToolResult | Forgotten | End
"""The parser's events are pieces of the answer and of its reasoning, calls, and failed attempts to call."""


@dataclass
class ChatSession:
    """A dialog with a model, and the settings of its answers.

    ``system`` is the system message. ``tools`` are schemas or names of built-in tools, which are described to
    the model, and ``tool_call_format`` is the format of its calls. ``execute`` runs a call. With tools but
    without ``execute``, calls are reported and not run. With neither, or under a ``constraint``, every answer
    is plain text, even if it looks like a call. An answer that repeats a passage ``max_repeats`` times in a
    row is stopped (0: never).
    """

    engine: Engine
    system: str = ""
    tools: Sequence[str | dict[str, Any]] = ()
    tool_call_format: str | None = None
    execute: Execute | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=None))
    date: str | None = None
    constraint: Constraint | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    max_repeats: int = MAX_REPEATS

    def __post_init__(self) -> None:
        if self.engine.tokenizer is None:
            raise EngineError("chat needs a tokenizer, and this model has none")
        self.chat = self.engine.tokenizer.require_chat()
        self.reset()

    def reset(self) -> None:
        """Forget the dialog, except for the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Generator[ChatEvent, None, None]:
        """Answer ``question``, forgetting the oldest turns if the dialog does not fit into the context.

        Raises EngineError, and leaves the dialog unchanged, if the newest turn alone is too long. Closing the
        iterator, or an exception such as Ctrl-C inside it, ends the answer at that point.
        """
        before = list(self.messages)
        asked = {"role": "user", "content": question}
        self.messages.append(asked)
        try:
            yield from self._answer()
        except EngineError:
            self.messages[:] = before
            raise
        finally:
            if self.messages and self.messages[-1] == Parsed().message():
                self.messages.pop()  # the model wrote nothing
            if self.messages and self.messages[-1] is asked:
                self.messages.pop()

    def _answer(self) -> Iterator[ChatEvent]:
        loop = ToolLoop(self.messages, self.execute, MAX_ROUNDS)
        replies: list[_Reply] = []
        while loop.waiting:
            n_turns = self._n_turns
            ids = self._prompt()
            if n_turns > self._n_turns:
                yield Forgotten(n_turns - self._n_turns)
            request = Request(ids, self.sampling, constraint=self.constraint)
            reply = _Reply(self.engine, request, self.max_repeats)
            replies.append(reply)
            try:
                yield from reply.events(self._parser())
            finally:  # an interrupted reply keeps what was generated
                reply.cancel()
                loop.add(reply.parsed, complete=reply.reason == "stop")
            yield from loop.run_calls()
        reason = "rounds" if loop.exhausted else reply.reason
        speculated = [each.speculated for each in replies if each.speculated]
        yield End(
            reason,
            sum(each.n_tokens for each in replies),
            len(ids) + reply.n_tokens,
            self.engine.context,
            sum(speculated, Speculated()) if speculated else None,
        )

    def _parser(self) -> AnswerParser | None:
        """Return the parser of an answer. Without tools, one that looks like a call is text."""
        if self.constraint is not None:
            return None
        names = {tool_schema(tool, "tools")[0] for tool in self.tools}
        return self.chat.parser(tools=names or self.execute is not None)

    @property
    def _n_turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def _prompt(self) -> list[int]:
        """Forget turns until there is room for an answer, and return the ids of the dialog."""
        context = self.engine.context
        room = min(self.sampling.max_tokens or ANSWER_TOKENS, ANSWER_TOKENS, context // 4)
        messages = list(self.messages)
        render = partial(
            self.chat.render, tools=list(self.tools) or None, tool_call_format=self.tool_call_format,
            generation_prompt=True, date=self.date,
        )  # fmt: skip
        while len(ids := render(messages).ids) + room > context:
            starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if len(starts) < 2:
                break
            del messages[starts[0] : starts[1]]
        if len(ids) >= context:
            raise EngineError(
                f"the question takes {len(ids):,} tokens with the system message, and the context "
                f"has {context:,}: ask something shorter"
            )
        self.messages[:] = messages
        return ids


class _Reply:
    """One message of the model while it is generated."""

    def __init__(self, engine: Engine, request: Request, max_repeats: int) -> None:
        self._stream = engine.submit(request)
        self._watch = RepetitionWatch(max_repeats)
        self.parsed, self.n_tokens = Parsed(), 0
        self.reason: FinishReason | Literal["repetition"] = "cancelled"
        self.speculated: Speculated | None = None

    def events(self, parser: AnswerParser | None) -> Iterator[ChatEvent]:
        """Yield the message as it is generated. Without a ``parser`` all of it is text."""
        for delta in self._stream:
            self.n_tokens += len(delta.token_ids)
            self.reason = delta.finish_reason or self.reason
            self.speculated = delta.speculated
            if parser is not None:
                yield from self._keep(parser.feed(delta.text))
            elif delta.text:
                yield from self._keep([Content(delta.text)])
            if self._watch.feed(delta.token_ids) and delta.finish_reason is None:
                self._stream.cancel()
                self.reason = "repetition"
                break
        if parser is not None:
            yield from self._keep(parser.finish())

    def cancel(self) -> None:
        self._stream.cancel()

    def _keep(self, events: list[Event]) -> Iterator[ChatEvent]:
        for event in events:
            self.parsed.add(event)
            yield event


def complete(
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    constraint: Constraint | None = None,
    max_repeats: int = MAX_REPEATS,
) -> Generator[ChatEvent, None, None]:
    """Continue text as a base model does. The events are those of a dialog, but without calls."""
    if engine.tokenizer is None:
        raise EngineError("completion needs a tokenizer, and this model has none")
    ids = engine.tokenizer.encode(prompt, bos=True)
    reply = _Reply(engine, Request(ids, sampling, constraint=constraint), max_repeats)
    try:
        yield from reply.events(None)
    finally:
        reply.cancel()
    yield End(reply.reason, reply.n_tokens, len(ids) + reply.n_tokens, engine.context, reply.speculated)
