"""Answers of this process's engine: its tokens become events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from ..engine.request import Delta, TokenLogprob
from ..text.tokenizer import Tokenizer
from ..text.toolcall import Call, Content, Event, Malformed, Reasoning
from .events import (
    AnswerEnd,
    AnswerEvent,
    AnswerText,
    AnswerThought,
    AnswerUsage,
    Piece,
    ScoredToken,
    answer_call,
)
from .problems import Overloaded, api_error
from .source import AnswerSource

if TYPE_CHECKING:
    from ..engine.loop import EngineLoop, Generation
    from .auth import Principal
    from .chat import ReadyPrompt


class EngineSource(AnswerSource):
    """The generations of one engine that answer one or more prompts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[ReadyPrompt],
        generations: Sequence[Sequence[Generation]],
    ) -> None:
        self._prompts, self._generations = prompts, generations
        self._flat = [generation for group in generations for generation in group]
        flat_prompts = [prompt for prompt, group in zip(prompts, generations, strict=True) for _ in group]
        self._choices = [_ChoiceReader(index, prompt, tokenizer) for index, prompt in enumerate(flat_prompts)]
        self.warnings: list[str] = []

    async def pieces(self) -> AsyncIterator[Piece]:
        sampled = [0] * len(self._flat)
        async for index, delta in _merged(self._flat):
            if delta.finish_reason == "cancelled":
                raise Overloaded("the server is stopping, and this answer is not complete")
            sampled[index] += len(delta.token_ids) + (delta.stop_id is not None)
            choice = self._choices[index]
            events = [*choice.echo(self._flat[index]), *choice.feed(delta)]
            yield Piece(index, sampled[index], events)
        for choice in self._choices:
            self.warnings += choice.problems

    @property
    def usage(self) -> AnswerUsage:
        each = [generation.usage for generation in self._flat]
        firsts = [usage.first_token_seconds for usage in each if usage.first_token_seconds is not None]
        return AnswerUsage(
            prompt_tokens=sum(prompt.n_tokens for prompt in self._prompts),
            cached_tokens=sum(group[0].usage.cached_tokens for group in self._generations),
            completion_tokens=sum(usage.completion_tokens for usage in each),
            queue_seconds=min(usage.queue_seconds for usage in each),
            first_token_seconds=min(firsts, default=None),
            total_seconds=max(usage.total_seconds for usage in each),
        )

    @property
    def cached_tokens(self) -> int:
        return sum(group[0].shared_tokens for group in self._generations)

    def cancel(self) -> None:
        for generation in self._flat:
            if not generation.done:
                generation.cancel()


async def start_engine_source(
    loop: EngineLoop, tokenizer: Tokenizer, prompts: Sequence[ReadyPrompt], principal: Principal
) -> EngineSource:
    """Submit prompts to the engine, and return when their constraints are known to be followed."""
    generations: list[list[Generation]] = []
    try:
        for prompt in prompts:
            request = prompt.request(principal.cache_group, principal.key_id)
            generations.append(loop.submit(request, prompt.n))
        for group in generations:
            await group[0].ready()
    except BaseException as error:
        for group in generations:
            for generation in group:
                generation.cancel()
        if isinstance(error, Exception):
            raise api_error(error, submitting=True) from None
        raise
    return EngineSource(tokenizer, prompts, generations)


class _ChoiceReader:
    """Turns the deltas of one generation into events."""

    def __init__(self, index: int, prompt: ReadyPrompt, tokenizer: Tokenizer) -> None:
        self._index, self._prompt, self._tokenizer = index, prompt, tokenizer
        self._echoes = prompt.echo
        self._parser = prompt.make_parser() if prompt.make_parser else None
        self._n_calls = 0
        self.problems: list[str] = []

    def echo(self, generation: Generation) -> Iterable[AnswerEvent]:
        """Return the prompt's text and log-probabilities before the first delta, if they were requested.

        The token that begins every text is left out.
        """
        if not self._echoes:
            return ()
        self._echoes = False
        ids, start_ids = self._prompt.ids, self._tokenizer.start_ids
        if ids[: len(start_ids)] == start_ids:
            ids = ids[len(start_ids) :]
        scores: list[ScoredToken] = []
        if self._prompt.sampling.logprobs is not None:
            known = self._scored(generation.prompt_logprobs or ())[-len(ids) :] if ids else ()
            unknown = ids[: len(ids) - len(known)]  # nothing comes before a first token to predict it
            scores = [*(ScoredToken(self._tokenizer.token_bytes(id_), None) for id_ in unknown), *known]
        return [AnswerText(self._index, self._tokenizer.decode(ids), tuple(scores))]

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
            events.insert(0, AnswerText(self._index, text, self._scored(delta.logprobs)))
        if delta.finish_reason is not None:
            events.append(self._end(delta))
        return events

    def _scored(self, logprobs: Iterable[TokenLogprob]) -> tuple[ScoredToken, ...]:
        raw = self._tokenizer.token_bytes
        return tuple(
            ScoredToken(
                raw(each.id),
                each.logprob,
                tuple((raw(id_), nats) for id_, nats in each.top),
                each.id,
                tuple(id_ for id_, _ in each.top),
            )
            for each in logprobs
        )

    def _event(self, event: Event) -> AnswerEvent | None:
        if isinstance(event, Content):
            return AnswerText(self._index, event.text)
        if isinstance(event, Reasoning):
            return AnswerThought(self._index, event.text)
        if isinstance(event, Malformed):
            self.problems.append(f"tools=the model wrote a call that cannot be read: {event.reason}"[:300])
            return None
        assert isinstance(event, Call)
        call = event.call.name, event.call.arguments
        self._n_calls += 1
        return answer_call(self._index, self._n_calls - 1, call, self._prompt.tools, self.problems)

    def _end(self, delta: Delta) -> AnswerEnd:
        if delta.finish_reason != "stop":
            return AnswerEnd(self._index, "length")
        return AnswerEnd(self._index, "tool_calls" if self._n_calls else "stop", delta.stop_string)


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
