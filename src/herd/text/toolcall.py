"""Tool calls out of generated text: one incremental parser for the three forms of Llama 3.1.

====================================================  ===================
``{"type": "function", "name": …, "parameters": {…}}``  json ("arguments" is understood as well, "type" may be absent)
``name.call(query="…")``                              builtin
``<function=name>{…}</function>``                     function
``<|python_tag|>`` and then any other text            builtin: the code interpreter's code
====================================================  ===================

Text before, between and after calls is content. Several calls may follow each other, apart by ``;`` or white space.
``<|python_tag|>`` may be spelled or missing (decoders often drop special tokens); without it, a builtin call is
seen at the start of a line only. What begins as a call and is none stays in the content, and where it clearly
was meant as one, an error says why. Nothing that a model can write raises or hangs, and work is linear in the text.

**Streamed equals whole** by construction: the parser takes one character at a time, and what it does depends on
characters alone, never on how they were cut into pieces. A possible call is followed by a small grammar
(`toolcall_grammar.py`) that gives up at the first character that cannot belong to a call; all that was held back
becomes content at that moment. So plain text streams without delay, and braces in strings confuse nobody. What follows
``<|python_tag|>`` is decided at the message's end, where it would be run at the earliest anyway.

Source: llama-models ``models/llama3/tool_utils.py`` for the forms; it parses whole messages with regular expressions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import toolcall_grammar as grammar
from .chat import CODE_INTERPRETER
from .toolcall_grammar import END_MARKERS, FUNCTION_END, PYTHON_TAG, SPACE, Candidate, NotACall, ToolCall


@dataclass(frozen=True)
class Content:
    """Event: text for the user."""

    text: str


@dataclass(frozen=True)
class Call:
    """Event: a complete call."""

    call: ToolCall


@dataclass(frozen=True)
class Malformed:
    """Event: ``text`` was meant as a call but is none; it is also given as `Content`."""

    reason: str
    text: str


Event = Content | Call | Malformed


@dataclass
class Parsed:
    """A whole message: its content, its calls in order, and why other things that looked like calls are none."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Take one event in."""
        if isinstance(event, Content):
            self.content += event.text
        elif isinstance(event, Call):
            self.calls.append(event.call)
        else:
            self.errors.append(event.reason)


def parse(text: str) -> Parsed:
    """Parse one whole message of an assistant. Never raises, whatever the text."""
    parser, parsed = ToolCallParser(), Parsed()
    for event in [*parser.feed(text), *parser.finish()]:
        parsed.add(event)
    return parsed


class ToolCallParser:
    """Parses one message as it is generated: `feed` pieces of text, then `finish` once."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._space: list[str] = []  # white space not yet given out: it vanishes before and between calls
        self._held: list[str] = []  # text of the candidate below
        self._candidate: Candidate | None = None
        self._complete = False  # the candidate is a whole builtin call if its next character allows it
        self._tagged = False  # after <|python_tag|>: collect to the message's end, then decide
        self._line_start = True
        self._after_call = False
        self._after_function = False  # a </function> may follow
        self._any_content = False

    def feed(self, text: str) -> list[Event]:
        """Events that became certain with this piece of text; neighbouring content comes as one event."""
        for character in text:
            self._take(character)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The events that were open at the message's end. The parser is ready for another message then."""
        if self._tagged:
            self._close_tagged()
        elif self._complete:
            self._accept("builtin")
        elif self._candidate is not None:
            self._reject("the message ends within it", ended=True)
        if not self._after_call:
            self._give("")
        events = self._take_events()
        self.__init__()  # type: ignore[misc]
        return events

    # One character

    def _take(self, c: str) -> None:
        if self._tagged:
            self._take_tagged(c)
        elif self._complete:
            if c in SPACE or c in ";<":
                self._accept("builtin")
            else:
                self._reject("")
            self._take(c)
        elif self._candidate is not None:
            self._take_in_candidate(self._candidate, c)
        else:
            self._take_plain(c)

    def _take_plain(self, c: str) -> None:
        if c in SPACE:
            self._space.append(c)
            self._line_start = self._line_start or c == "\n"
        elif c == ";" and self._after_call:
            self._space.clear()
            self._after_function = False
        elif c == "{":
            self._begin(grammar.json_call(), c)
        elif c == "<":
            self._begin(grammar.tag(), c)
        elif self._line_start and (c == "_" or (c.isascii() and c.isalpha())):
            self._begin(grammar.builtin_call(), c)
        else:
            self._give(c)

    def _take_in_candidate(self, candidate: Candidate, c: str) -> None:
        try:
            candidate.send(c)
        except StopIteration as stop:
            self._held.append(c)
            self._accept(stop.value)
        except NotACall as no:
            self._reject(no.reason)
            self._take(c)
        else:
            self._held.append(c)

    def _take_tagged(self, c: str) -> None:
        self._held.append(c)
        if c == ">":
            tail = "".join(self._held[-len(PYTHON_TAG) :])
            for marker in (PYTHON_TAG, *END_MARKERS):
                if tail.endswith(marker) and len(self._held) >= len(PYTHON_TAG) + len(marker):
                    del self._held[-len(marker) :]
                    self._close_tagged()
                    if marker == PYTHON_TAG:
                        self._held, self._tagged = list(PYTHON_TAG), True
                    return

    # What becomes of a candidate

    def _begin(self, candidate: Candidate, c: str) -> None:
        next(candidate)
        self._candidate, self._held = candidate, [c]

    def _accept(self, kind: str) -> None:
        """The held text is complete. It may still be no call, if it only has the shape of one."""
        if kind == "builtin" and not self._complete:
            self._complete = True  # wait for one more character: `name.call(x=1).other` is no call
            return
        text = self._release()
        if kind == PYTHON_TAG:
            self._tagged, self._held = True, list(text)
            return
        if kind in END_MARKERS:
            return
        if kind == FUNCTION_END:
            if self._after_function:
                self._after_function = False
                self._space.clear()
            else:
                self._give(text)
            return
        try:
            call = grammar.READ[kind](text)
        except NotACall as no:
            if no.reason:
                self._events.append(Malformed(no.reason, text))
            self._give(text)
            return
        self._add_call(call)

    def _add_call(self, call: ToolCall) -> None:
        self._events.append(Call(call))
        self._space.clear()
        self._after_call = self._line_start = True
        self._after_function = call.tool_call_format == "function"

    def _reject(self, reason: str, *, ended: bool = False) -> None:
        """The held text is no call: give it out, with an error where it was meant as one."""
        candidate_text = self._release()
        if reason and grammar.was_meant(candidate_text, first=not self._any_content, ended=ended):
            self._events.append(Malformed(f"malformed call: {reason}", candidate_text))
        self._give(candidate_text)

    def _release(self) -> str:
        text = "".join(self._held)
        self._held, self._candidate, self._complete = [], None, False
        return text

    def _close_tagged(self) -> None:
        """Decide what followed <|python_tag|>: calls, something meant as calls, or code."""
        text = self._release()
        self._tagged = False
        body = text.removeprefix(PYTHON_TAG)
        inner = ToolCallParser()
        events = [*inner.feed(body), *inner.finish()]
        if events and isinstance(events[0], Call):
            for event in events:
                if isinstance(event, Call):
                    self._add_call(event.call)
                elif isinstance(event, Content):
                    self._give(event.text)
                else:
                    self._events.append(event)
            return
        first = events[0] if events else None
        if isinstance(first, Malformed) and body.lstrip(SPACE).startswith(first.text):
            self._events.append(first)
        elif not body.strip():
            self._events.append(Malformed(f"malformed call: nothing follows {PYTHON_TAG}", text))
        else:
            self._add_call(ToolCall(CODE_INTERPRETER, {"code": body}, "builtin"))
            return
        self._give(text)

    # Giving out

    def _give(self, text: str) -> None:
        """Content, now certain, and the white space before it."""
        text = "".join(self._space) + text
        self._space.clear()
        if not text:
            return
        self._events.append(Content(text))
        self._after_call = self._after_function = False
        last_line = text.rpartition("\n")
        self._line_start = bool(last_line[1]) and not last_line[2].strip(SPACE)
        self._any_content = self._any_content or bool(text.strip(SPACE))

    def _take_events(self) -> list[Event]:
        merged: list[Event] = []
        parts: list[str] = []
        for event in self._events:
            if isinstance(event, Content):
                parts.append(event.text)
                continue
            if parts:
                merged.append(Content("".join(parts)))
                parts = []
            merged.append(event)
        if parts:
            merged.append(Content("".join(parts)))
        self._events = []
        return merged
