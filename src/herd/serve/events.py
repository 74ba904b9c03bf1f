"""The events of an answer, which every API writes in its own form, and their sums.

Where an answer comes from does not matter here: `source.py` says what its sources have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .tools import OfferedTool

EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ScoredToken:
    """The bytes of a token and its log-probability in nats.

    ``top`` has the most likely tokens in its place, best first. ``logprob`` None: the token is the first of a text,
    which nothing predicts.
    """

    raw: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class AnswerText:
    """A piece of the text of a choice, and the log-probabilities of its tokens if they were requested."""

    index: int
    text: str
    logprobs: tuple[ScoredToken, ...] = ()


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


AnswerEvent = AnswerText | AnswerThought | AnswerCall | AnswerEnd


@dataclass(frozen=True)
class Piece:
    """What a source delivers at a time: events of the choice ``index``.

    ``tokens`` is the number of tokens sampled for the choice up to here, those held back so far included.
    """

    index: int
    tokens: int
    events: Sequence[AnswerEvent]


@dataclass
class Choice:
    """A whole choice: the sum of its events."""

    index: int
    text: str = ""
    thought: str = ""
    calls: list[AnswerCall] = field(default_factory=list)
    logprobs: list[ScoredToken] = field(default_factory=list)
    reason: EndReason = "stop"
    stop_string: str | None = None

    def add(self, event: AnswerEvent) -> None:
        """Add the next event of this choice."""
        if isinstance(event, AnswerText):
            self.text += event.text
            self.logprobs += event.logprobs
        elif isinstance(event, AnswerThought):
            self.thought += event.text
        elif isinstance(event, AnswerCall):
            self.calls.append(event)
        else:
            self.reason, self.stop_string = event.reason, event.stop_string


@dataclass(frozen=True)
class AnswerUsage:
    """Tokens and seconds of an answer. A prompt with several choices is counted once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float

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
