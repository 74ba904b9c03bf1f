"""The parser of tool calls in generated text, whole or as it comes.

=========================================================  =================================================
``{"type": "function", "name": …, "parameters": {…}}``     json; also ``"arguments"`` or ``"args"``, and
                                                           ``"type"`` may be absent
``name.call(query="…")``                                   builtin
``<function=name>{…}</function>``                          function
``<|python_tag|>`` and then any other text                 builtin: code for the code interpreter
=========================================================  =================================================

These are Llama 3.1's formats. Models also write lists of JSON calls, lists like ``[f(x="y"), g()]``, single
quotes, parameters as a string, ``{"tool_calls": […]}``, and fences, ``<tool_call>`` or ``<function_call>``
around calls. These are read as json, and the text around the calls is dropped.

Ordinary answers may have the form of a call, such as ``{"name": "Ann", "parameters": {}}``. A parser that
knows the names of the tools takes such text for a call only if it names one of them. Text that says of itself
that it is a call, by ``"type": "function"``, a tag or ``"tool_calls"``, is one with any name, so that the
model learns that there is no such tool.

Text before, between and after calls is content. Calls may be separated by ``;``, ``,`` or white space.
``<|python_tag|>`` may be missing, because decoders often drop special tokens. Without it, builtin calls and
lists like ``[f()]`` are found at the start of a line only. Text that begins like a call but is not one stays
in the content. If it was clearly meant as a call, an error says what is wrong. No text raises, and the
time is linear in the text.

**Streaming gives the same result as parsing the whole text**, because the parser takes one character at a
time and what it does depends on characters alone. A possible call is matched by a grammar
(`toolcall_grammar.py`) that gives up at the first character that cannot belong to a call. Then all text that
was held back becomes content. So plain text streams without delay. What follows ``<|python_tag|>`` is decided
at the end of the message, where it would be run at the earliest.

Source: llama-models ``models/llama3/tool_utils.py`` for the formats. It parses whole messages with regular
expressions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby

from . import toolcall_grammar as grammar
from .messages import CODE_INTERPRETER
from .toolcall_grammar import Match, NotACall, Reader, ToolCall

ENDED = "the message ends within it"


@dataclass(frozen=True)
class Content:
    """Event: text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Event: what a reasoning model thinks before its answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """Event: a complete call."""

    call: ToolCall


@dataclass(frozen=True)
class Malformed:
    """Event: ``text`` was meant as a call but is not one. It is also in a `Content`."""

    reason: str
    text: str


Event = Content | Reasoning | Call | Malformed


@dataclass
class Parsed:
    """A parsed message: content, calls in order, and what is wrong with text that was meant as a call."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reasoning: str = ""

    def add(self, event: Event) -> None:
        """Add an event of the parser."""
        if isinstance(event, Content):
            self.content += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, Call):
            self.calls.append(event.call)
        else:
            self.errors.append(event.reason)

    def message(self) -> dict[str, object]:
        """Return the message of the assistant that `ChatFormat.render` writes the same way."""
        calls = [call.to_dict() for call in self.calls]
        return {"role": "assistant", "content": self.content} | ({"tool_calls": calls} if calls else {})


def parse(text: str) -> Parsed:
    """Parse a whole message of an assistant. Never raises."""
    parser, parsed = ToolCallParser(), Parsed()
    for event in [*parser.feed(text), *parser.finish()]:
        parsed.add(event)
    return parsed


class ToolCallParser:
    """An incremental parser of one message: `feed` it pieces of text, then `finish` once.

    ``names`` are the tools that were offered. None: not known, so every name may be a tool's.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = names
        self._events: list[Event] = []
        self._gap: list[str] = []  # white space, separators and wrappers, which vanish if a call follows
        self._opened: list[str] = []  # what would close the wrappers in the gap
        self._closers: list[str] = []  # what closes wrappers that were dropped, or may follow a call
        self._in_fence = False  # within a fence that is content
        self._held: list[str] = []  # text of the candidate
        self._candidate: Reader[Match] | None = None
        self._tagged = False  # after <|python_tag|>: text is collected to the end of the message
        self._line_start = True
        self._after_call = False
        self._any_content = False

    def feed(self, text: str) -> list[Event]:
        """Return the events that are certain after this piece of text. Adjacent content is one event."""
        for character in text:
            self._take(character)
        return self._take_events()

    def finish(self) -> list[Event]:
        """Return the events that were open at the end of the message, and get ready for the next message."""
        if self._candidate is not None:
            self._take_in_candidate("\n", at_end=True)
        if self._tagged:
            self._close_tagged()
        if not self._after_call:
            self._give("")
        events = self._take_events()
        self.__init__(self._names)  # type: ignore[misc]
        return events

    # One character

    def _take(self, c: str) -> None:
        if self._tagged:
            self._take_tagged(c)
        elif self._candidate is not None:
            self._take_in_candidate(c)
        elif c in grammar.WHITE_SPACE:
            self._gap.append(c)
            self._line_start = self._line_start or c == "\n"
        elif c in ";," and self._after_call:
            self._gap.append(c)
        else:
            self._candidate = self._grammar_for(c)
            if self._candidate is None:
                self._give(c)
            else:
                next(self._candidate)
                self._held = [c]

    def _grammar_for(self, c: str) -> Reader[Match] | None:
        """Return the grammar of what may begin with ``c`` here."""
        if c == "{":
            return grammar.json_call()
        if c == "[":
            return grammar.bracketed_calls(pythonic=self._line_start)
        if c == "<":
            return grammar.tag()
        if c == "`":
            return grammar.fence(closing=self._in_fence or grammar.FENCE in self._closers)
        if self._line_start and grammar.starts_identifier(c):
            return grammar.builtin_call(c)
        return None

    def _take_in_candidate(self, c: str, *, at_end: bool = False) -> None:
        assert self._candidate is not None
        try:
            self._candidate.send(c)
        except StopIteration as stop:
            match: Match = stop.value
            if not match.ahead:
                self._held.append(c)
            if self._is_expected(match):
                self._accept(match, self._release())
            else:
                self._reject("")
            if match.ahead and not at_end:
                self._take(c)
        except NotACall as no:
            self._reject(ENDED if at_end else no.reason, ended=at_end)
            if not at_end:
                self._take(c)
        else:
            if at_end:
                self._reject(ENDED, ended=True)
            else:
                self._held.append(c)

    def _take_tagged(self, c: str) -> None:
        self._held.append(c)
        if c != ">":
            return
        tail = "".join(self._held[-len(grammar.PYTHON_TAG) :])
        for marker in (grammar.PYTHON_TAG, *grammar.END_MARKERS):
            if tail.endswith(marker) and len(self._held) >= len(grammar.PYTHON_TAG) + len(marker):
                del self._held[-len(marker) :]
                self._close_tagged()
                if marker == grammar.PYTHON_TAG:
                    self._held, self._tagged = list(grammar.PYTHON_TAG), True

    # What becomes of a candidate

    def _is_expected(self, match: Match) -> bool:
        """Return whether calls name a tool that was offered, or are marked as calls."""
        marks = [*self._opened, *(self._closers if self._after_call else ())]
        is_marked = match.certain or any(mark not in (grammar.FENCE, grammar.FUNCTION_END) for mark in marks)
        names = self._names
        return not match.calls or is_marked or names is None or any(c.name in names for c in match.calls)

    def _accept(self, match: Match, text: str) -> None:
        for call in match.calls:
            self._add_call(call)
        tag = match.tag
        if tag == grammar.PYTHON_TAG:
            self._tagged, self._held = True, list(text)
        elif tag in self._closers:
            self._closers.remove(tag)
            self._gap.clear()
        elif tag in grammar.WRAPPERS and not self._in_fence:
            self._gap.append(text)
            self._opened.append(grammar.WRAPPERS[tag])
            self._line_start = True
        elif tag and tag not in grammar.END_MARKERS:
            self._in_fence = False if tag == grammar.FENCE else self._in_fence
            self._give(text)

    def _add_call(self, call: ToolCall) -> None:
        self._events.append(Call(call))
        self._gap.clear()
        self._closers += self._opened
        self._opened.clear()
        if call.tool_call_format == "function":
            self._closers.append(grammar.FUNCTION_END)
        self._after_call = self._line_start = True

    def _reject(self, reason: str, *, ended: bool = False) -> None:
        """Make the held text content, and report an error if it was meant as a call."""
        text = self._release()
        if reason and grammar.was_meant_as_call(text, first=not self._any_content, ended=ended):
            self._events.append(Malformed(f"malformed call: {reason}", text))
        self._give(text)

    def _release(self) -> str:
        text = "".join(self._held)
        self._held, self._candidate = [], None
        return text

    def _close_tagged(self) -> None:
        """Decide what followed <|python_tag|>: calls, text that was meant as a call, or code."""
        text = self._release()
        self._tagged = False
        body = text.removeprefix(grammar.PYTHON_TAG)
        inner = ToolCallParser()
        events = [*inner.feed(body), *inner.finish()]
        first = events[0] if events else None
        if isinstance(first, Call):
            for event in events:
                if isinstance(event, Call):
                    self._add_call(event.call)
                elif isinstance(event, Content):
                    self._give(event.text)
                else:
                    self._events.append(event)
        elif isinstance(first, Malformed) and body.lstrip(grammar.WHITE_SPACE).startswith(first.text):
            self._events.append(first)
            self._give(text)
        elif not body.strip():
            self._events.append(Malformed(f"malformed call: nothing follows {grammar.PYTHON_TAG}", text))
            self._give(text)
        else:
            self._add_call(ToolCall(CODE_INTERPRETER, {"code": body}, "builtin"))

    # Events

    def _give(self, text: str) -> None:
        """Make the gap and ``text`` content."""
        text = "".join(self._gap) + text
        self._gap.clear()
        self._in_fence = self._in_fence or grammar.FENCE in self._opened
        self._opened.clear()
        if not text:
            return
        self._events.append(Content(text))
        self._after_call = False
        last_line = text.rpartition("\n")
        self._line_start = bool(last_line[1]) and not last_line[2].strip(grammar.WHITE_SPACE)
        self._any_content = self._any_content or bool(text.strip(grammar.WHITE_SPACE))

    def _take_events(self) -> list[Event]:
        events: list[Event] = []
        for are_content, some in groupby(self._events, key=lambda event: isinstance(event, Content)):
            if are_content:
                events.append(Content("".join(event.text for event in some if isinstance(event, Content))))
            else:
                events += some
        self._events = []
        return events
