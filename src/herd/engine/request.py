"""Requests to the engine and its answers. Does not import torch, so that wire formats can be built from it.

A `Request` has the ids of a prompt and the settings of its answer. The engine answers with a stream of
`Delta`s, whose ids and texts add up to the `Completion`. Settings are checked when they are made, and
requests when they are submitted, before any computing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ContextError, EngineError
from .constraint import Constraint

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""stop: a stop token, a stop string or the end of a constraint. length: ``max_tokens`` reached. context: the
model's context is full. cancelled: the caller or a failure ended the answer."""


@dataclass(frozen=True)
class Sampling:
    """Settings for picking tokens and for ending. The defaults are greedy: the same answer every time.

    ``max_tokens`` defaults to the rest of the context. ``temperature`` 0 is greedy. Otherwise logits are
    divided by it, and then ``top_k`` (0 = off), ``top_p`` (1 = off) and ``min_p`` (0 = off) remove unlikely
    tokens, in this order. ``seed`` defaults to a random one. With a seed and quantized weights, the tokens do
    not depend on the other requests of the batch. ``stop`` strings end the answer and are not part of it.
    With ``logprobs``, each token gets its log-probability under the model's own distribution
    (temperature 1, no token removed) and those of the ``logprobs`` most likely tokens at its position.

    Before all this, penalties and biases change the logits (`logits.py`): ``repetition_penalty`` divides
    positive and multiplies negative logits of every token seen in prompt or answer (1 = off; CTRL, arXiv
    1909.05858). ``presence_penalty`` is subtracted once from each token of the answer, and
    ``frequency_penalty`` as many times as it occurred. ``logit_bias`` {id: x} is added. The last three are
    OpenAI's, with the same bounds, except that a bias of -inf forbids a token.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", None), ("logprobs", 0)):
            if (value := getattr(self, name)) is not None:
                _check_integer(name, value, least)
        for name, low, high, hint in (
            ("temperature", 0, math.inf, "0 is greedy"),
            ("top_p", 0, 1, "1 turns it off"),
            ("min_p", 0, 1, "0 turns it off"),
            ("repetition_penalty", 0, math.inf, "1 turns it off"),
            ("presence_penalty", -2, 2, "0 turns it off"),
            ("frequency_penalty", -2, 2, "0 turns it off"),
        ):
            _check_real(name, getattr(self, name), low, high, hint)
        if self.top_p == 0:
            raise EngineError("top_p=0 keeps no token: use temperature=0 for the most likely one")
        if self.repetition_penalty == 0:
            raise EngineError(
                "repetition_penalty=0 would divide by zero: use more than 1 to discourage repetition"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise EngineError(f"stop={self.stop!r}: stop strings must be non-empty text")
        if not isinstance(self.logit_bias, Mapping):
            raise EngineError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        for id_, bias in self.logit_bias.items():
            _check_integer("a token id of logit_bias", id_, 0)
            if bias != -math.inf:
                _check_real(f"logit_bias of token {id_}", bias, -100, 100, "-100 all but forbids a token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether there are penalties or biases."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    ``stop_ids`` end the answer in addition to the tokenizer's own stop tokens. A ``constraint`` defines the
    form of the answer, and ends it when nothing more may follow. Requests of one ``tenant`` share the cached
    keys and values of common prompt beginnings. Tenants share nothing with each other. Requests of different
    ``owner``s take turns when they begin and when their prompts are computed. With ``prompt_logprobs``, each
    token of the prompt but the first gets its log-probability, and those of that many most likely tokens at
    its position. The prompt is then computed as a whole, even if it is cached. With ``embeds`` there is no
    answer: the stream ends with an ``embedding`` of the prompt.
    ``adapter`` names one of the adapters on the engine's model ("": none, see `llama.switched`).
    """

    prompt_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    tenant: str = ""
    owner: str = ""
    adapter: str = ""
    prompt_logprobs: int | None = None
    embeds: bool = False

    def validate(self, vocab_size: int, context: int) -> None:
        """Raise EngineError if a model with this vocabulary and context cannot serve the request.

        It is a ContextError if the prompt is too long.
        """
        n = len(self.prompt_ids)
        if n == 0:
            raise EngineError(
                "the prompt is empty: give at least one token, e.g. the beginning-of-text token"
            )
        if n >= context:
            raise ContextError(
                f"the prompt has {n} tokens, the context has {context}, and the answer needs at least one: "
                "shorten the prompt"
            )
        low, high = min(self.prompt_ids), max(self.prompt_ids)
        if low < 0 or high >= vocab_size:
            raise EngineError(
                f"prompt token {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}: "
                "encode the prompt with the model's own tokenizer"
            )
        if self.prompt_logprobs is not None:
            _check_integer("prompt_logprobs", self.prompt_logprobs, 0)
        counts = {"top_k": self.sampling.top_k, "logprobs": self.sampling.logprobs}
        for name, value in (counts | {"prompt_logprobs": self.prompt_logprobs}).items():
            if (value or 0) > vocab_size:
                raise EngineError(f"{name}={value} is more than the vocabulary of {vocab_size}")
        if (most := max(self.sampling.logit_bias, default=0)) >= vocab_size:
            raise EngineError(f"logit_bias: token {most} is outside the model's vocabulary of {vocab_size}")


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token in nats, and the most likely (id, logprob), best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Speculated:
    """Counts of a request's draft tokens: drafted, verified (up to the first rejected one) and accepted."""

    drafted: int = 0
    verified: int = 0
    accepted: int = 0

    def __add__(self, other: Speculated) -> Speculated:
        return Speculated(
            self.drafted + other.drafted, self.verified + other.verified, self.accepted + other.accepted
        )

    @property
    def acceptance_rate(self) -> float:
        """Accepted / verified, an estimate of 1 - TV(model, draft). 0 if none was verified."""
        return self.accepted / self.verified if self.verified else 0.0


@dataclass(frozen=True)
class Delta:
    """The tokens and the text that one step adds to an answer.

    ``text`` may lag behind ``token_ids``: an incomplete character, or a possible beginning of a stop string,
    is held back. Only the last delta has a ``finish_reason``, the ``stop_string`` that ended the answer, and
    ``speculated`` if the engine has a draft.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    speculated: Speculated | None = None
    stop_string: str | None = None


@dataclass(frozen=True)
class Usage:
    """The tokens and times of a request, up to now. They are final once its answer is read or cancelled.

    ``cached_tokens`` of the ``prompt_tokens`` came from the cache. ``completion_tokens`` were sampled for the
    request, up to and including the last one that its reader took, or that was used up as stop token or stop
    string. Times in seconds since the request was submitted: ``queue_seconds`` until it began,
    ``first_token_seconds`` until its first token (None: not yet), ``total_seconds`` until its end or now.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    ``ids`` exclude the stop token, which is ``stop_id`` (None if something else ended the answer). With stop
    strings, ``ids`` include every token that was generated, while ``text`` ends before the stop string.
    ``shared_tokens`` is the number of prompt tokens that came from the cache. ``prompt_logprobs`` are those
    of all tokens of the prompt but the first, if the request asked for them.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_id: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_tokens: int = 0
    shared_tokens: int = 0
    speculated: Speculated | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


def _check_integer(name: str, value: object, least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise EngineError(f"{name}={value!r} must be an integer")
    if least is not None and value < least:
        raise EngineError(f"{name}={value} must be at least {least}")


def _check_real(name: str, value: object, low: float, high: float, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EngineError(f"{name}={value!r} must be a finite number")
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise EngineError(f"{name}={value} must be {bounds}; {hint}")
