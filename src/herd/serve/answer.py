"""Answers in progress: tokens of the engine become events, which every API writes in its own form.

A `LiveAnswer` is one request of a client, with one or more choices. Whatever happens to it (the end, an error, a
client that goes away, a server that stops, a key that is revoked), it is settled once and its pages are freed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..engine.request import Delta, TokenLogprob
from ..text.toolcall import Call, Content, Event, Malformed, Reasoning
from .chat import ReadyPrompt, ServedModel
from .errors import Unauthorized
from .ledger import Reservation, Status
from .problems import Overloaded, api_error
from .tools import OfferedTool

if TYPE_CHECKING:
    from ..engine.loop import Generation
    from .auth import Principal

log = logging.getLogger("herd.serve")

EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class AnswerText:
    """A piece of the text of a choice, and the log-probabilities of its tokens if they were requested."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


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


@dataclass
class Choice:
    """A whole choice: the sum of its events."""

    index: int
    text: str = ""
    thought: str = ""
    calls: list[AnswerCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
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


class LiveAnswer:
    """The choices of one request while they are generated. `events` yields them as they come.

    ``warnings`` are told to the client at the end. `close` must be called in every case. It calls ``finished`` with
    the end's status and the usage.
    """

    def __init__(
        self,
        served: ServedModel,
        prompts: Sequence[ReadyPrompt],
        generations: Sequence[Sequence[Generation]],
        reservation: Reservation,
        warnings: list[str],
        has_ended: Callable[[], bool] = lambda: False,
        finished: Callable[[Status, AnswerUsage], None] = lambda status, usage: None,
    ) -> None:
        self.id = secrets.token_hex(12)
        self.served, self.prompts, self.warnings = served, prompts, warnings
        self.generations = generations
        self._flat = [generation for group in generations for generation in group]
        self._choices = [
            _ChoiceReader(index, prompt)
            for index, prompt in enumerate(
                prompt for prompt, group in zip(prompts, generations, strict=True) for _ in group
            )
        ]
        self._reservation, self._has_ended, self._finished = reservation, has_ended, finished
        self._status: Status = "cancelled"
        self._closed = False
        self._delivered = 0

    @property
    def usage(self) -> AnswerUsage:
        """Tokens and times up to now."""
        each = [generation.usage for generation in self._flat]
        firsts = [usage.first_token_seconds for usage in each if usage.first_token_seconds is not None]
        return AnswerUsage(
            prompt_tokens=sum(len(prompt.ids) for prompt in self.prompts),
            cached_tokens=sum(group[0].usage.cached_tokens for group in self.generations),
            completion_tokens=sum(usage.completion_tokens for usage in each),
            queue_seconds=min(usage.queue_seconds for usage in each),
            first_token_seconds=min(firsts, default=None),
            total_seconds=max(usage.total_seconds for usage in each),
        )

    async def events(self, *, delivers: bool) -> AsyncIterator[AnswerEvent]:
        """Yield events as they are generated. Raises `ApiError`.

        ``delivers``: the client gets each event at once, so that it is billed from then on. Tokens that are held
        back, e.g. of an incomplete tool call, are billed with the event that has them.
        """
        sampled, delivered = [0] * len(self._flat), [0] * len(self._flat)
        try:
            async for index, delta in _merged(self._flat):
                if self._has_ended():
                    raise Unauthorized("this key was revoked, or has expired, while the answer was generated")
                if delta.finish_reason == "cancelled":
                    raise Overloaded("the server is stopping, and this answer is not complete")
                sampled[index] += len(delta.token_ids) + (delta.stop_id is not None)
                events = list(self._choices[index].feed(delta))
                if delivers and events:
                    delivered[index] = sampled[index]
                    self._advance(sum(delivered))
                for event in events:
                    yield event
            for choice in self._choices:
                self.warnings += choice.problems
            self._status = "completed"
        except Exception as error:
            self._status = "failed"
            raise api_error(error) from None

    def deliver(self) -> None:
        """Bill the whole answer, which is about to be sent at once."""
        self._advance(sum(generation.usage.completion_tokens for generation in self._flat))

    def _advance(self, n_tokens: int) -> None:
        self._delivered = n_tokens
        self._reservation.advance(n_tokens, self._cached)

    @property
    def _cached(self) -> int:
        return sum(group[0].shared_tokens for group in self.generations)

    def cancel(self) -> None:
        """End the answer early, from any thread. `events` then raises."""
        for generation in self._flat:
            if not generation.done:
                generation.cancel()

    @property
    def remarks(self) -> dict[str, Any]:
        """What Herd tells clients beside the answer: warnings, and its cost if the model has a price."""
        remarks = {"warnings": self.warnings, "cost": self._reservation.cost(self._delivered, self._cached)}
        return {name: value for name, value in remarks.items() if value}

    def close(self) -> None:
        """Cancel what is still generated, and settle the bill. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self.cancel()
        usage = self.usage
        # An answer of which nothing was delivered bills nothing, but what was computed counts towards the key's limits.
        self._reservation.settle(self._delivered or usage.completion_tokens, self._cached, self._status)
        self._finished(self._status, usage)


class _ChoiceReader:
    """Turns the deltas of one generation into events."""

    def __init__(self, index: int, prompt: ReadyPrompt) -> None:
        self._index, self._prompt = index, prompt
        self._parser = prompt.make_parser() if prompt.make_parser else None
        self._n_calls = 0
        self.problems: list[str] = []

    def feed(self, delta: Delta) -> Iterable[AnswerEvent]:
        """Return the events of one delta. The log-probabilities go with the first of them."""
        if self._parser is None:
            parsed: list[Event] = [Content(delta.text)] if delta.text else []
        else:
            parsed = self._parser.feed(delta.text)
            if delta.finish_reason is not None:
                parsed += self._parser.finish()
        events = [event for each in parsed if (event := self._event(each)) is not None]
        if delta.logprobs:
            text = ""
            if events and isinstance(events[0], AnswerText):
                text = events.pop(0).text  # type: ignore[union-attr]
            events.insert(0, AnswerText(self._index, text, delta.logprobs))
        if delta.finish_reason is not None:
            events.append(self._end(delta))
        return events

    def _event(self, event: Event) -> AnswerEvent | None:
        if isinstance(event, Content):
            return AnswerText(self._index, event.text)
        if isinstance(event, Reasoning):
            return AnswerThought(self._index, event.text)
        if isinstance(event, Malformed):
            self.problems.append(f"tools=the model wrote a call that cannot be read: {event.reason}"[:300])
            return None
        assert isinstance(event, Call)
        name = event.call.name
        tool = self._prompt.tools.get(name)
        if tool is None:
            self.problems.append(f"tools=the model called {name!r}, which is not among the tools")
            tool = OfferedTool(name)
        arguments = json.dumps(event.call.arguments, ensure_ascii=False)
        self._n_calls += 1
        return AnswerCall(self._index, self._n_calls - 1, secrets.token_hex(12), tool, arguments)

    def _end(self, delta: Delta) -> AnswerEnd:
        stops = self._prompt.sampling.stop
        if delta.finish_reason != "stop":
            return AnswerEnd(self._index, "length")
        known = len(stops) == 1 and delta.stop_id is None and self._prompt.form.constraint is None
        return AnswerEnd(self._index, "tool_calls" if self._n_calls else "stop", stops[0] if known else None)


async def start_answer(
    served: ServedModel,
    prompts: Sequence[ReadyPrompt],
    principal: Principal,
    reservation: Reservation,
    warnings: list[str],
    has_ended: Callable[[], bool] = lambda: False,
    finished: Callable[[Status, AnswerUsage], None] = lambda status, usage: None,
) -> LiveAnswer:
    """Submit prompts to the engine, and return when their constraints are known to be followed.

    Raises `ApiError`, after settling the reservation with nothing, if the engine does not take them.
    """
    generations: list[list[Generation]] = []
    try:
        for prompt in prompts:
            request = prompt.request(principal.cache_group, principal.key_id)
            generations.append(served.loop.submit(request, prompt.n))
        answer = LiveAnswer(served, prompts, generations, reservation, warnings, has_ended, finished)
        for group in generations:
            await group[0].ready()
        return answer
    except BaseException as error:
        for group in generations:
            for generation in group:
                generation.cancel()
        reservation.settle(0, 0, "failed")
        if isinstance(error, Exception):
            raise api_error(error, submitting=True) from None
        raise


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Delta]]:
    """Yield the deltas of all generations as they arrive, with the number of the generation."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(each, None)): number for number, each in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                number = waiting.pop(task)
                if (arrived := task.result()) is not None:
                    yield number, arrived
                    waiting[asyncio.ensure_future(anext(generations[number], None))] = number
    finally:
        for task in waiting:
            task.cancel()
