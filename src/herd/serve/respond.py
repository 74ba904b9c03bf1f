"""Send an answer: at once or as a stream of events, for every API in the same way.

Headers of a stream go out before the prompt is computed. While nothing else is sent, a comment goes out every
few seconds, because clients and proxies close silent connections. A client that goes away, or that does not
read, ends its answer: the engine stops within a step.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .answer import LiveAnswer
from .calls import ChatCall
from .errors import ApiError
from .events import AnswerEvent, AnswerUsage, Choice
from .exchange import Exchange
from .ledger import Reservation
from .problems import BadRequest, api_error, openai_error
from .settings import ServeSettings
from .source import CheckedPrompt
from .statements import STEP_MARK
from .steps import ToolAgent, begin_step

LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters at which Python's splitlines ends a line, and which JSON need not escape."""


WriteBody = Callable[[Sequence[Choice], LiveAnswer], Any]
"""A function that returns the body of a response that is not streamed, as JSON has it."""


class AnswerWriter(ABC):
    """How one API writes answers, whole or as a stream. One writer is made for each request.

    ``ping`` keeps a silent stream alive. Empty: the format of the stream has nothing that clients would
    ignore.
    """

    media_type = "text/event-stream; charset=utf-8"
    ping = b": ping\n\n"

    _answer: LiveAnswer

    def begin(self, answer: LiveAnswer) -> bytes:
        """Return the first events of a stream, which are sent before anything is generated. Default: none."""
        self._answer = answer
        return b""

    @abstractmethod
    def event(self, event: AnswerEvent) -> bytes:
        """Return the stream's events for one event of the answer."""

    @abstractmethod
    def end(self, answer: LiveAnswer) -> bytes:
        """Return the last events of a stream."""

    @abstractmethod
    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> Any:
        """Return the body of a response that is not streamed, as JSON has it."""

    def error(self, error: ApiError) -> bytes:
        """Return the event that tells of an error in a stream. Default: as OpenAI's clients read it."""
        return sse_data(openai_error(error))


async def respond(
    exchange: Exchange[Any],
    prompts: Sequence[CheckedPrompt],
    writer: AnswerWriter | WriteBody,
    *,
    stream: bool = False,
    call: ChatCall | None = None,
) -> Response:
    """Reserve the worst case, begin to answer, and return the response. Raises `ApiError` before it begins.

    With the ``call`` of which the prompt was made, the tools of this server that are among its tools are run.
    """
    request, principal, served = exchange.request, exchange.principal, exchange.served
    state, endpoint = request.app.state, request.scope["route"].path
    billing_id = _billing_id(request)

    def reserve(prompts: Sequence[CheckedPrompt], step: int) -> Reservation:
        return state.ledger.reserve(
            principal,
            model=served.name,
            endpoint=endpoint,
            prompt_tokens=sum(prompt.n_tokens for prompt in prompts),
            max_completion_tokens=sum(prompt.max_completion_tokens(served.context) for prompt in prompts),
            request_id=billing_id if step == 1 else f"{request.state.request_id}{STEP_MARK}{step}",
            step=step,
        )

    agent = None
    if call is not None and any(tool.group for tool in call.tools):
        if call.n > 1:
            raise BadRequest("n: with tools of this server there is one answer", "n")
        agent = ToolAgent(state.tools, served, call, principal, reserve, exchange.settings)

    def finished(status: str, usage: AnswerUsage) -> None:
        stop_watching()
        request.state.ended = status, usage
        state.metrics.finished(served.name, endpoint, status, usage)

    step = await begin_step(served, prompts, principal, reserve)
    has_ended = partial(state.authenticator.has_ended, principal)
    answer = LiveAnswer(served, prompts, step, exchange.warnings, has_ended, finished, agent)
    stop_watching = state.authenticator.watch(principal, answer.cancel)
    if stream and isinstance(writer, AnswerWriter):
        return EventStream(answer, writer, exchange.settings, exchange.headers)
    write = writer.body if isinstance(writer, AnswerWriter) else writer
    return await _respond_at_once(request, answer, write, exchange.headers)


def _billing_id(request: Request) -> str:
    """Return the id that a request is billed under, once: the client's, to recognize a retry, or ours."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return str(request.state.request_id)
    if not 0 < len(key) <= 128 or not key.isascii() or not key.isprintable():
        raise BadRequest("Idempotency-Key must have 1 to 128 printable ASCII characters")
    return key


async def _respond_at_once(
    request: Request, answer: LiveAnswer, write: WriteBody, headers: dict[str, str]
) -> Response:
    collecting = asyncio.ensure_future(collect(answer))
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise BadRequest("the client closed the connection", status=499)
        choices = collecting.result()
        answer.deliver()
        return JSONResponse(write(choices, answer), headers=headers)
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await run_in_threadpool(answer.close)


async def collect(answer: LiveAnswer) -> list[Choice]:
    """Return the whole choices of an answer."""
    n_choices = sum(prompt.n for prompt in answer.prompts)
    choices = [Choice(index) for index in range(n_choices)]
    async for event in answer.events(delivers=False):
        choices[event.index].add(event)
    return choices


class EventStream(Response):
    """A response of server-sent events, written as the answer is generated."""

    def __init__(
        self, answer: LiveAnswer, writer: AnswerWriter, settings: ServeSettings, headers: dict[str, str]
    ) -> None:
        super().__init__(None, 200, headers, writer.media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # nginx would collect events
        self._answer, self._writer, self._settings = answer, writer, settings
        self._last_sent = time.monotonic()
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client goes away or does not read."""
        tasks = [
            asyncio.ensure_future(self._write(send)),
            asyncio.ensure_future(_disconnected(receive)),
            asyncio.ensure_future(self._watch(send)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        except OSError:
            pass  # the connection is gone
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await run_in_threadpool(self._answer.close)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        await self._send(send, self._writer.begin(self._answer))
        async for chunk in self._chunks():
            if chunk:
                await self._send(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        writer = self._writer
        try:
            async for event in self._answer.events(delivers=True):
                yield writer.event(event)
            yield writer.end(self._answer)
        except Exception as error:
            yield writer.error(api_error(error))

    async def _send(self, send: Send, chunk: bytes) -> None:
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        # uvloop writes at the end of an iteration. If several tokens are ready, they must not be noted in the
        # ledger before the first of them is written: after `kill -9` the client would pay for all of them.
        await asyncio.sleep(0)
        self._sending_since = None
        self._last_sent = time.monotonic()

    async def _watch(self, send: Send) -> None:
        """Send a comment whenever nothing was sent for a while. Return when the client does not read."""
        settings = self._settings
        while True:
            await asyncio.sleep(max(0.05, self._last_sent + settings.ping_seconds - time.monotonic()))
            if self._sending_since is not None:
                if time.monotonic() - self._sending_since > settings.stall_seconds:
                    return
                await asyncio.sleep(min(1.0, settings.stall_seconds))
            elif self._writer.ping and time.monotonic() - self._last_sent >= settings.ping_seconds:
                await self._send(send, self._writer.ping)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def json_text(value: Any) -> str:
    """Return compact JSON on one line, also for clients that divide lines at Unicode's line separators."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(LINE_ENDS)


def sse_data(value: Any) -> bytes:
    """Return a server-sent event without a name, whose data are JSON."""
    return f"data: {json_text(value)}\n\n".encode()
