"""Answers in progress: whatever happens to one, it is settled once and what it uses is freed.

A `LiveAnswer` is one request of a client, with one or more choices. It ends by itself, by an error, with a
client that goes away, with a server that stops, or with a key that is revoked.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from functools import reduce
from typing import Any

from .errors import Unauthorized
from .events import AnswerEnd, AnswerEvent, AnswerUsage
from .ledger import Status
from .problems import api_error
from .source import CheckedPrompt, Servable
from .steps import AnswerStep, StepReply, ToolAgent

COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")
ENDED = "this key was revoked, or has expired, while the answer was generated"


class LiveAnswer:
    """The choices of one request while they are generated. `events` yields them as they come.

    ``tokens`` has the number of tokens of each choice up to the latest event. ``warnings`` are told to the
    client at the end. With an ``agent`` the tools of this server run between the steps of the answer. `close`
    must be called in every case. It calls ``finished`` with the end's status and the usage.
    """

    def __init__(
        self,
        served: Servable[Any],
        prompts: Sequence[CheckedPrompt],
        step: AnswerStep,
        warnings: list[str],
        has_ended: Callable[[], bool] = lambda: False,
        finished: Callable[[Status, AnswerUsage], None] = lambda status, usage: None,
        agent: ToolAgent | None = None,
    ) -> None:
        self.id = secrets.token_hex(12)
        self.served, self.prompts, self.warnings = served, prompts, warnings
        self._steps = [step]
        self._has_ended, self._finished, self._agent = has_ended, finished, agent
        self._status: Status = "cancelled"
        self._closed = False
        self.tokens: dict[int, int] = {}

    @property
    def usage(self) -> AnswerUsage:
        """Tokens and times up to now."""
        return reduce(operator.add, self.usages)

    @property
    def usages(self) -> list[AnswerUsage]:
        """Tokens and times of each step."""
        return [step.source.usage for step in self._steps]

    async def events(self, *, delivers: bool) -> AsyncIterator[AnswerEvent]:
        """Yield events as they are generated. Raises `ApiError`.

        ``delivers``: the client gets each event at once, so that it is billed from then on. Tokens that are
        held back, e.g. of an incomplete tool call, are billed with the event that has them.
        """
        try:
            events = self._events_of_step(delivers, None)
            if self._agent is not None:
                events = self._events_of_steps(delivers, self._agent)
            async for event in events:
                yield event
            self._status = "completed"
        except Exception as error:
            self._status = "failed"
            raise api_error(Unauthorized(ENDED) if self._has_ended() else error) from None

    async def _events_of_step(self, delivers: bool, reply: StepReply | None) -> AsyncIterator[AnswerEvent]:
        """Yield the events of the last step, except those that ``reply`` keeps."""
        step = self._steps[-1]
        sampled: dict[int, int] = {}
        before = sum(self.tokens.values())
        async for piece in step.source.pieces():
            if self._has_ended():
                raise Unauthorized(ENDED)
            events = piece.events if reply is None else reply.take(piece.events)
            if events:
                self.tokens[piece.index] = before + piece.tokens
            if delivers and events:
                sampled[piece.index] = piece.tokens
                step.advance(sum(sampled.values()))
            for event in events:
                yield event
        self.warnings += step.source.warnings

    async def _events_of_steps(self, delivers: bool, agent: ToolAgent) -> AsyncIterator[AnswerEvent]:
        n_client_calls = 0
        while True:
            reply = StepReply(n_client_calls, agent.has_client_tools)
            async for event in self._events_of_step(delivers, reply):
                yield event
            if reply.end is None:  # there is nothing to run
                return
            n_client_calls = reply.n_client_calls
            if delivers:
                self._steps[-1].advance(self._steps[-1].source.usage.completion_tokens)
            results = []
            for call in reply.server_calls:
                yield call
                results.append(await agent.run(call))
                if self._has_ended():
                    raise Unauthorized(ENDED)
                yield results[-1]
            following = None
            if not n_client_calls:
                following = await agent.next_step(reply, results, self._steps, self.warnings)
            if following is None:
                yield AnswerEnd(0, "tool_calls" if n_client_calls else "length")
                return
            self._steps.append(following)

    def deliver(self) -> None:
        """Bill the whole answer, which is about to be sent at once."""
        for step in self._steps:
            step.advance(step.source.usage.completion_tokens)

    def cancel(self) -> None:
        """End the answer early, from any thread. `events` then raises."""
        for step in self._steps:
            step.source.cancel()

    @property
    def warned(self) -> dict[str, Any]:
        """The field ``herd`` of a body, with the warnings, or nothing if there are none."""
        return {"herd": {"warnings": self.warnings}} if self.warnings else {}

    @property
    def remarks(self) -> dict[str, Any]:
        """Remarks for clients: warnings, the cost if the model has a price, and the steps."""
        steps = [{name: asdict(usage)[name] for name in COUNTS} for usage in self.usages]
        remarks = {
            "warnings": self.warnings,
            "cost": _sum_of_costs([step.cost for step in self._steps]),
            "steps": steps if len(steps) > 1 else None,
        }
        return {name: value for name, value in remarks.items() if value}

    def close(self) -> None:
        """Cancel what is still generated, and settle the bill. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        usage, first = self.usage, self.usages[0]
        for step in self._steps:
            step.close(self._status)
        self._finished(self._status, replace(usage, first_token_seconds=first.first_token_seconds))


def _sum_of_costs(costs: Sequence[dict[str, str] | None]) -> dict[str, str] | None:
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    return known[0] | {"amount": str(sum(Decimal(cost["amount"]) for cost in known))}
