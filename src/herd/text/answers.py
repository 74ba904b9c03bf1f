"""The parser of a model's answer, whole or as it comes: reasoning, content and tool calls.

Reasoning models write ``<think>…</think>`` before their answer. In some chat formats the prompt has the
opening tag already. The tags are recognized at the beginning of an answer only, and only in the formats of
such models. White space around the reasoning belongs to neither part. What follows is content, in which tool
calls are found if tools were offered (`toolcall`). Streamed and whole text give the same result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .toolcall import Content, Event, Parsed, Reasoning, ToolCallParser

THINK, THINK_END = "<think>", "</think>"


class AnswerParser:
    """An incremental parser of one answer: `feed` it pieces of text, then `finish` once.

    ``tools`` are the names of the tools that were offered, or whether any were.
    ``reasoning``: the answer may begin with a reasoning span. ``opened``: the prompt has opened it.
    ``drops_space``: one space at the very beginning is the tokenizer's, not the answer's.
    """

    def __init__(
        self,
        *,
        tools: bool | Collection[str] = False,
        reasoning: bool = False,
        opened: bool = False,
        drops_space: bool = False,
    ) -> None:
        self._calls = ToolCallParser(None if tools is True else tools) if tools else None
        self._drops_space = drops_space
        self._part = "reasoning" if opened else "start" if reasoning else "content"
        self._held = ""  # text that is not decided yet
        self._began = False  # whether the reasoning has any text so far

    def feed(self, text: str) -> list[Event]:
        """Return the events that are certain after this piece of text."""
        if self._drops_space and text:
            self._drops_space, text = False, text.removeprefix(" ")
        return list(self._take(text)) if text else []

    def finish(self) -> list[Event]:
        """Return the events that were open at the end of the answer."""
        held, self._held = self._held, ""
        events: list[Event] = []
        if self._part == "start":
            events += self._content(held)
        elif self._part == "reasoning" and held.strip():
            events.append(Reasoning(held.rstrip()))
        return events + (self._calls.finish() if self._calls else [])

    def parse(self, text: str) -> Parsed:
        """Return a whole answer. Never raises."""
        parsed = Parsed()
        for event in [*self.feed(text), *self.finish()]:
            parsed.add(event)
        return parsed

    def _take(self, text: str) -> Iterator[Event]:
        text, self._held = self._held + text, ""
        if self._part == "start":
            bare = text.lstrip()
            if bare.startswith(THINK):
                self._part, text = "reasoning", bare.removeprefix(THINK)
            elif THINK.startswith(bare):
                self._held = text
                return
            else:
                self._part = "content"
        if self._part == "reasoning":
            text = text if self._began else text.lstrip()
            thought, tag, text = text.partition(THINK_END)
            shown = thought[: len(thought) - (0 if tag else overlap(thought, THINK_END))].rstrip()
            if shown:
                self._began = True
                yield Reasoning(shown)
            if not tag:
                self._held = thought[len(shown) :]
                return
            self._part = "gap"
        if self._part == "gap":
            text = text.lstrip()
            if not text:
                return
            self._part = "content"
        yield from self._content(text)

    def _content(self, text: str) -> list[Event]:
        if self._calls:
            return self._calls.feed(text)
        return [Content(text)] if text else []


def overlap(text: str, tag: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``tag``."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
