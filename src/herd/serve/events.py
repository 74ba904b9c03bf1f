"""The events of an answer, which every API writes in its own form, and their sums.

Where an answer comes from does not matter here: `source.py` says what its sources have in common.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from ..engine.request import Usage
from .tools import OfferedTool

PARAGRAPH = "\n\n"
"""What separates the texts of different steps where an API has only one text."""
EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ScoredToken:
    """The bytes of a token and its log-probability in nats.

    ``top`` has the most likely tokens in its place, best first. ``logprob`` is None for the first token of a
    text, which nothing predicts. ``id`` and ``top_ids`` are known for models of this process.
    """

    raw: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()
    id: int | None = None
    top_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class AnswerText:
    """A piece of the text of a choice, and the log-probabilities of its tokens if they were requested."""

    index: int
    text: str
    logprobs: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class AnswerVector(AnswerText):
    """The embedding of an input, in place of a text."""

    values: Sequence[float] = ()


@dataclass(frozen=True)
class AnswerThought:
    """A piece of the reasoning of a choice."""

    index: int
    text: str


@dataclass(frozen=True)
class AnswerCall:
    """A complete call of a tool, the ``number``-th of its choice. ``arguments`` are JSON."""

    index: int
    number: int
    id: str
    tool: OfferedTool
    arguments: str


@dataclass(frozen=True)
class AnswerEnd:
    """The end of a choice. ``stop_string`` is the one that ended it, if that is known."""

    index: int
    reason: EndReason
    stop_string: str | None = None


@dataclass(frozen=True)
class ServerCall:
    """A call of a tool that this server is about to run. ``arguments`` are JSON."""

    index: int
    id: str
    tool: OfferedTool
    arguments: str


@dataclass(frozen=True)
class ServerResult:
    """What the tool of the server gave for a call: the text that the model reads. ``ok``: the tool worked."""

    call: ServerCall
    text: str
    ok: bool

    @property
    def index(self) -> int:
        return self.call.index


AnswerEvent = AnswerText | AnswerThought | AnswerCall | ServerCall | ServerResult | AnswerEnd


def answer_call(
    index: int, number: int, call: tuple[str, Any], tools: Mapping[str, OfferedTool], warnings: list[str]
) -> AnswerCall:
    """Return the event of a call (name, arguments) that a model wrote.

    A name that is not among the ``tools`` is added to the ``warnings``.
    """
    name, arguments = call
    if name not in tools:
        warnings.append(f"tools=the model called {name[:80]!r}, which is not among the tools")
    tool = tools.get(name, OfferedTool(name))
    return AnswerCall(index, number, secrets.token_hex(12), tool, json.dumps(arguments, ensure_ascii=False))


@dataclass(frozen=True)
class Piece:
    """What a source delivers at a time: events of the choice ``index``.

    ``tokens`` is the number of tokens sampled for the choice up to here, those held back so far included.
    """

    index: int
    tokens: int
    events: Sequence[AnswerEvent]


def stop_fields(end: AnswerEnd | Choice) -> dict[str, str]:
    """Return the stop string that ended a choice, under the name that vLLM gives it, if one did."""
    return {} if end.stop_string is None else {"stop_reason": end.stop_string}


class Paragraphs:
    """Joins the texts of an answer's steps, for APIs whose answers have one text."""

    def __init__(self) -> None:
        self._has_text = self._is_new_step = False

    def text(self, event: AnswerEvent) -> str:
        """Return the text that an event adds. The first text after tools have run begins a paragraph."""
        if isinstance(event, ServerResult):
            self._is_new_step = True
        if not isinstance(event, AnswerText) or not event.text:
            return ""
        gap = PARAGRAPH if self._has_text and self._is_new_step else ""
        self._has_text, self._is_new_step = True, False
        return gap + event.text


@dataclass
class Choice:
    """A whole choice: all of its events."""

    index: int
    events: list[AnswerEvent] = field(default_factory=list)
    reason: EndReason = "stop"
    stop_string: str | None = None

    def add(self, event: AnswerEvent) -> None:
        """Add the next event of this choice."""
        if isinstance(event, AnswerEnd):
            self.reason, self.stop_string = event.reason, event.stop_string
        else:
            self.events.append(event)

    @property
    def text(self) -> str:
        """The text of all steps."""
        paragraphs = Paragraphs()
        return "".join(map(paragraphs.text, self.events))

    @property
    def vector(self) -> Sequence[float]:
        """The embedding of an input."""
        return next(event.values for event in self.events if isinstance(event, AnswerVector))

    @property
    def thought(self) -> str:
        """The reasoning of all steps."""
        return "".join(event.text for event in self.events if isinstance(event, AnswerThought))

    @property
    def calls(self) -> list[AnswerCall]:
        """The calls that the client has to run."""
        return [event for event in self.events if isinstance(event, AnswerCall)]

    @property
    def results(self) -> list[ServerResult]:
        """The calls that this server has run."""
        return [event for event in self.events if isinstance(event, ServerResult)]

    @property
    def logprobs(self) -> list[ScoredToken]:
        """The log-probabilities of the text's tokens."""
        texts = (event for event in self.events if isinstance(event, AnswerText))
        return [score for event in texts for score in event.logprobs]

    @property
    def parts(self) -> list[AnswerEvent]:
        """All events, but adjacent texts as one, and without those of calls that have a result."""
        out: list[AnswerEvent] = []
        for kind, group in groupby((e for e in self.events if not isinstance(e, ServerCall)), type):
            events: list[Any] = list(group)
            if kind is AnswerText:
                scores = tuple(score for event in events for score in event.logprobs)
                events = [AnswerText(self.index, "".join(event.text for event in events), scores)]
            elif kind is AnswerThought:
                events = [AnswerThought(self.index, "".join(event.text for event in events))]
            out += events
        return out


class AnswerUsage(Usage):
    """Tokens and seconds of an answer or of all its steps. A prompt with several choices counts once."""

    def __add__(self, other: AnswerUsage) -> AnswerUsage:
        """Return the sums. The time to the first token is the time that all prompts took."""
        firsts = [each for each in (self.first_token_seconds, other.first_token_seconds) if each is not None]
        return AnswerUsage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.queue_seconds + other.queue_seconds,
            sum(firsts) if firsts else None,
            self.total_seconds + other.total_seconds,
        )

    @property
    def timings(self) -> dict[str, float]:
        """The speeds in llama.cpp's form, which web pages show."""
        first = self.total_seconds if self.first_token_seconds is None else self.first_token_seconds
        prefill = max(first - self.queue_seconds, 1e-6)
        decode = max(self.total_seconds - first, 1e-6)
        computed = self.prompt_tokens - self.cached_tokens
        rest = max(self.completion_tokens - 1, 0)  # the first token belongs to the prompt
        return {
            "cache_n": self.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": 1e3 * prefill,
            "prompt_per_token_ms": 1e3 * prefill / max(computed, 1),
            "prompt_per_second": computed / prefill,
            "predicted_n": self.completion_tokens,
            "predicted_ms": 1e3 * decode,
            "predicted_per_token_ms": 1e3 * decode / rest if rest else 0.0,
            "predicted_per_second": rest / decode,
        }
