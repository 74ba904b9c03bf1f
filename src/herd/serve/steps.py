"""The steps of an answer, and the loop between a model and the tools of this server.

A step asks the model once. If its reply calls tools of this server, they run, and the next step asks the
model again with their results. An answer ends with a reply without such calls, with a call that the client
has to run, or at a limit. Every step is reserved before it begins and has a place of its own in the ledger
(`ledger.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool

from .calls import ChatCall
from .errors import ApiError, BudgetExceeded, RateLimited
from .events import AnswerCall, AnswerEnd, AnswerEvent, AnswerText, ServerCall, ServerResult
from .ledger import Reservation
from .problems import PromptTooLong, api_error
from .source import AnswerSource, CheckedPrompt, Servable
from .tools import ToolChoice, function_call

if TYPE_CHECKING:
    from .auth import Principal
    from .server_tools import ServerTools
    from .settings import ServeSettings

Reserve = Callable[[Sequence[CheckedPrompt], int], Reservation]
"""A blocking function that reserves the worst case of prompts in the step of a number."""


@dataclass
class AnswerStep:
    """One time that a model is asked. ``delivered`` is the number of its tokens that the client has."""

    source: AnswerSource
    reservation: Reservation
    delivered: int = 0

    def advance(self, n_tokens: int) -> None:
        """Note how many tokens the client has after the next write."""
        self.delivered = n_tokens
        self.reservation.advance(n_tokens, self.source.cached_tokens, self.source.prompt_tokens)

    @property
    def cost(self) -> dict[str, str] | None:
        """The cost of what the client has received, or None if the model has no price."""
        source = self.source
        return self.reservation.cost(self.delivered, source.cached_tokens, source.prompt_tokens)

    def close(self, status: Any) -> None:
        """Cancel what is still generated, and settle the bill."""
        self.source.cancel()
        # An answer of which nothing was delivered is not billed, but what was computed counts towards the
        # key's limits.
        n_tokens = self.delivered or self.source.usage.completion_tokens
        self.reservation.settle(n_tokens, self.source.cached_tokens, status, self.source.prompt_tokens)


async def begin_step(
    served: Servable[Any],
    prompts: Sequence[CheckedPrompt],
    principal: Principal,
    reserve: Reserve,
    number: int = 1,
) -> AnswerStep:
    """Reserve the worst case and ask the model. If that fails, settle with nothing and raise `ApiError`."""
    billed = bool(principal.key_id)  # without keys nobody is
    await served.measure(prompts, billed=billed)
    bound = sum(prompt.n_tokens for prompt in prompts)
    try:
        reservation = await _reserve(reserve, prompts, number)
    except (BudgetExceeded, RateLimited):
        await served.measure(prompts, billed=billed, refused=True)
        if sum(prompt.n_tokens for prompt in prompts) == bound:
            raise
        reservation = await _reserve(reserve, prompts, number)
    try:
        return AnswerStep(await served.start(prompts, principal), reservation)
    except BaseException as error:
        reservation.settle(0, 0, "failed")
        if isinstance(error, Exception):
            raise api_error(error) from None
        raise


async def _reserve(reserve: Reserve, prompts: Sequence[CheckedPrompt], number: int) -> Reservation:
    """Reserve in a thread. If the client leaves meanwhile, settle with nothing."""
    reserving = asyncio.ensure_future(run_in_threadpool(reserve, prompts, number))
    try:
        return await asyncio.shield(reserving)
    except asyncio.CancelledError:  # the thread does not know
        with suppress(ApiError):
            (await reserving).settle(0, 0, "cancelled")
        raise


class _Limit(Exception):
    """The reason why there is no further step."""


class StepReply:
    """The reply of one step: what the next step needs, sorted out of the events for the client."""

    def __init__(self, n_client_calls: int, has_client_tools: bool) -> None:
        self.n_client_calls, self._has_client_tools = n_client_calls, has_client_tools
        self.text = ""
        self.server_calls: list[ServerCall] = []
        self.end: AnswerEnd | None = None
        """The end of the reply, if its calls have to be run here."""

    def take(self, events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
        """Return the events for the client. Calls of this server's tools, and an end after them, are kept."""
        passed: list[AnswerEvent] = []
        for event in events:
            # Without functions of the client, a name that the model has made up is an error for the model.
            if isinstance(event, AnswerCall) and (event.tool.group or not self._has_client_tools):
                self.server_calls.append(ServerCall(event.index, event.id, event.tool, event.arguments))
                continue
            if isinstance(event, AnswerCall):
                event = replace(event, number=self.n_client_calls)
                self.n_client_calls += 1
            elif isinstance(event, AnswerText):
                self.text += event.text
            elif isinstance(event, AnswerEnd) and self.server_calls and event.reason != "length":
                self.end = event
                continue
            passed.append(event)
        return passed


class ToolAgent:
    """Runs the tools of this server for one answer, and begins its next steps."""

    def __init__(
        self,
        tools: ServerTools,
        served: Servable[Any],
        call: ChatCall,
        principal: Principal,
        reserve: Reserve,
        settings: ServeSettings,
    ) -> None:
        self._tools, self._served, self._call = tools, served, call
        self._principal, self._reserve, self._settings = principal, reserve, settings
        self._max_tokens: int | None = call.sampling.get("max_tokens")
        self.has_client_tools = any(not tool.group for tool in call.tools)

    async def run(self, call: ServerCall) -> ServerResult:
        """Run a call. An error of the tool is a result too."""
        return ServerResult(call, *await self._tools.call(call.tool, call.arguments))

    async def next_step(
        self,
        reply: StepReply,
        results: Sequence[ServerResult],
        steps: Sequence[AnswerStep],
        warnings: list[str],
    ) -> AnswerStep | None:
        """Call the model again with its tools' results. At a limit, add to ``warnings`` and return None."""
        usages = [step.source.usage for step in steps]
        completion = sum(usage.completion_tokens for usage in usages)
        total = completion + sum(usage.prompt_tokens for usage in usages)
        settings, number = self._settings, len(steps) + 1
        left = settings.tool_tokens - total
        if self._max_tokens is not None:
            left = min(left, self._max_tokens - completion)
        self._call = self._continued(reply, results, left)
        try:
            if number > settings.tool_steps:
                raise _Limit(f"after {len(steps)} steps, the limit of this server")
            if left <= 0:
                raise _Limit("because the tokens that it may have are used up")
            prompt = await self._served.prepare_chat(self._call)
        except (_Limit, PromptTooLong) as error:
            reason = "because the context is full" if isinstance(error, PromptTooLong) else str(error)
            warnings.append(f"tools=the answer ended {reason}")
            return None
        await run_in_threadpool(steps[-1].reservation.shrink, usages[-1].completion_tokens)
        return await begin_step(self._served, [prompt], self._principal, self._reserve, number)

    def _continued(self, reply: StepReply, results: Sequence[ServerResult], max_tokens: int) -> ChatCall:
        """Return the call for the next step. The model may choose now, if it had to call a tool before."""
        call = self._call
        calls, answers = [], []
        for made, text in ((result.call, result.text) for result in results):
            calls.append(function_call(made.id, made.tool.name, json.loads(made.arguments)))
            answers.append({"role": "tool", "content": text, "tool_call_id": made.id})
        message = {"role": "assistant", "content": call.prefill + reply.text, "tool_calls": calls}
        return replace(
            call,
            messages=[*call.messages, message, *answers],
            sampling={**call.sampling, "max_tokens": max(max_tokens, 1)},
            tool_choice=ToolChoice("auto", call.tool_choice.names),
            prefill="",
            warnings=[],
        )
