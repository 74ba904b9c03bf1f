"""Answers of other servers: streams of their chunks become events.

A request is tried on another upstream only as long as nothing of its answer has arrived. Later an upstream
that fails ends the answer with an error, and what was delivered is billed (`upstream_wire.py` says how it is
counted).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientResponse

from ..engine.request import Sampling
from .errors import ApiError
from .events import AnswerEnd, AnswerEvent, AnswerUsage, AnswerVector, Piece
from .http_client import ConnectError, HttpError
from .problems import BadRequest, Overloaded, ServerFault
from .source import AnswerSource
from .tools import OfferedTool
from .upstream_wire import (
    ChoiceReader,
    encoded,
    error_message,
    prompt_beginning,
    stream_options,
    told_usage,
    told_warnings,
)
from .upstreams import MAX_ANSWER, Fleet, Upstream, describe, read_limited
from .vectors import read_vector

log = logging.getLogger("herd.serve")

START_SECONDS = 2.0
"""How long a response waits for its upstream to accept the request. Later errors are events of the stream."""
QUEUE_PIECES = 64
"""Pieces that are read ahead for a client that reads slowly."""
STOPPING = "the server is stopping, and this answer is not complete"


@dataclass
class UpstreamPrompt:
    """A prompt for another server: ``body`` goes to ``path``.

    It has about ``estimate`` tokens, and at most ``bound``. ``counted`` is their number, once an upstream has
    counted them, which it can do if the prompt ``is_countable``. The fields in ``passed`` go there too, and
    add at most ``passed_tokens``. ``embeds``: nothing is generated.
    """

    path: str
    body: dict[str, Any]
    sampling: Sampling
    n: int
    estimate: int
    bound: int
    tools: Mapping[str, OfferedTool] = field(default_factory=dict)
    cache_salt: str = ""
    warnings: list[str] = field(default_factory=list)
    counted: int | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)
    is_countable: bool = True
    embeds: bool = False

    @property
    def n_tokens(self) -> int:
        return self.bound if self.counted is None else min(self.counted + self.passed_tokens, self.bound)

    @property
    def passed_tokens(self) -> int:
        return len(encoded(self.passed)) if self.passed else 0

    def max_completion_tokens(self, context: int) -> int:
        """Return the most tokens that all answers together can have."""
        if self.embeds:
            return 0
        room = max(context - (1 if self.counted is None else self.counted), 1)
        return self.n * min(self.sampling.max_tokens or room, room)


class _UpstreamFailed(Exception):
    """An upstream that did not answer. ``error`` is what the client is told if there is no other one."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


class UpstreamSource(AnswerSource):
    """The streams of other servers that answer one or more prompts with the same model."""

    def __init__(self, fleet: Fleet, model: str, prompts: Sequence[UpstreamPrompt], cache_group: str) -> None:
        self._arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(QUEUE_PIECES)
        self._streams: list[_Stream] = []
        first = 0
        for prompt in prompts:
            salt = fleet.salt(f"{cache_group}\0{prompt.cache_salt}")
            self._streams.append(_Stream(fleet, model, prompt, first, salt, self._arrived.put))
            first += prompt.n
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._first: float | None = None
        self._ended: float | None = None
        self._read: dict[int, int] = {}
        self._tasks = [asyncio.create_task(self._run(stream)) for stream in self._streams]
        self.warnings: list[str] = []

    async def accepted(self) -> None:
        """Return when all upstreams have accepted, or are slow. Raises the error of one that failed."""
        waiting = [asyncio.create_task(stream.accepted.wait()) for stream in self._streams]
        try:
            await asyncio.wait(waiting, timeout=START_SECONDS)
        finally:
            for task in waiting:
                task.cancel()
        for stream in self._streams:
            if stream.failure is not None and not stream.delivers:
                self._stop_reading()
                raise stream.failure

    async def pieces(self) -> AsyncIterator[Piece]:
        n_open = len(self._streams)
        while n_open:
            arrived = await self._arrived.get()
            if arrived is None:
                n_open -= 1
            elif isinstance(arrived, Exception):
                self._stop_reading()
                raise arrived
            else:
                if self._first is None:
                    self._first = time.monotonic()
                self._read[arrived.index] = arrived.tokens
                yield arrived
        self._ended = time.monotonic()
        for stream in self._streams:
            self.warnings += stream.warnings

    @property
    def usage(self) -> AnswerUsage:
        ended = self._ended or time.monotonic()
        return AnswerUsage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(self._read.values()),
            queue_seconds=0.0,
            first_token_seconds=None if self._first is None else self._first - self._began,
            total_seconds=ended - self._began,
        )

    @property
    def prompt_tokens(self) -> int:
        return sum(stream.prompt_tokens for stream in self._streams)

    @property
    def cached_tokens(self) -> int:
        return sum(stream.cached_tokens for stream in self._streams)

    def cancel(self) -> None:
        self._loop.call_soon_threadsafe(self._stop, Overloaded(STOPPING))

    @property
    def is_open(self) -> bool:
        """Whether the answer is still generated."""
        return any(not task.done() for task in self._tasks)

    def _stop(self, error: ApiError) -> None:
        if self.is_open:
            self._stop_reading()
            while not self._arrived.empty():
                self._arrived.get_nowait()
            self._arrived.put_nowait(error)

    def _stop_reading(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _run(self, stream: _Stream) -> None:
        failure: ApiError | None = None
        try:
            await stream.run()
        except ApiError as error:
            failure = error
        except Exception as error:  # e.g. a chunk of another form than the API's
            log.error("an upstream's answer cannot be read", exc_info=error)
            failure = _gateway_error("the upstream's answer cannot be read")
        if failure is not None:
            stream.fail(failure)
        await self._arrived.put(failure)


class _Stream:
    """One prompt at one upstream, or one after another until one answers."""

    def __init__(
        self, fleet: Fleet, model: str, prompt: UpstreamPrompt, first: int, salt: str, put: Any
    ) -> None:
        self._fleet, self._model, self._prompt, self._salt, self._put = fleet, model, prompt, salt, put
        self._first = first  # index of the prompt's first choice
        self._told_prompt: int | None = None
        self._total: int | None = None  # of all choices, once the upstream has told it
        self._told_warnings: list[str] = []
        self.cached_tokens = 0
        self.accepted = asyncio.Event()
        self.failure: ApiError | None = None
        self.delivers = False
        self._choices = self._new_choices()

    @property
    def prompt_tokens(self) -> int:
        """The upstream's number, or the one that it counted before, or an estimate."""
        if self._told_prompt is not None:
            return self._told_prompt
        counted = self._prompt.counted
        return max(1, self._prompt.estimate) if counted is None else counted

    @property
    def warnings(self) -> list[str]:
        """What the client is told: the upstream's own warnings, and calls that cannot be read."""
        return self._told_warnings + [warning for choice in self._choices for warning in choice.warnings]

    def fail(self, error: ApiError) -> None:
        """Note that no upstream answers the prompt."""
        self.failure = error
        self.accepted.set()

    async def run(self) -> None:
        """Read the answer of an upstream. Raises `ApiError` if none answers, or if one fails later."""
        fleet, tried = self._fleet, set[str]()
        failure: ApiError | None = None
        beginning = self._salt.encode() + prompt_beginning(self._prompt.body)
        while True:
            upstream = fleet.choose(self._model, tried, beginning)
            if upstream is None:
                raise failure or Overloaded(
                    f"no upstream with the model {self._model} is up; try again later"
                )
            tried.add(upstream.url)
            upstream.n_open += 1
            try:
                await self._read(upstream)
                return
            except _UpstreamFailed as failed:
                failure = failed.error
                if self.delivers:
                    raise failure from None
            finally:
                upstream.n_open -= 1

    async def _read(self, upstream: Upstream) -> None:
        """Read one upstream's answer. Raises `_UpstreamFailed`."""
        fleet, times = self._fleet, self._fleet.times
        prompt, tells_usage = self._prompt, upstream.tells_usage(self._model)
        stream = {} if prompt.embeds else stream_options(tells_usage)
        body = encoded({**prompt.passed, **prompt.body, **stream, "cache_salt": self._salt})
        exchange = fleet.client.exchange(upstream.url, prompt.path, body)
        try:
            async with asyncio.timeout(times.first) as limit, exchange as response:
                if response.status != 200:
                    raise refusal(upstream, response, await read_limited(response))
                self.accepted.set()
                if prompt.embeds:
                    await self._read_embeddings(response, limit)
                else:
                    await self._read_events(upstream, response, limit)
        except TimeoutError:
            text = f"the upstream sent nothing for {times.silence if self.delivers else times.first:g} s"
            raise _UpstreamFailed(_gateway_error(text, 504)) from None
        except ConnectError as error:
            fleet.mark_down(upstream, describe(error))
            raise _UpstreamFailed(Overloaded("the upstream is down; try again later")) from None
        except HttpError:
            text = "the upstream closed the connection before the end of the answer"
            raise _UpstreamFailed(_gateway_error(text)) from None

    async def _read_embeddings(self, response: ClientResponse, limit: asyncio.Timeout) -> None:
        answer = json.loads(await read_limited(response))
        limit.reschedule(None)
        if (usage := told_usage(answer)) is not None:
            self._told_prompt, self.cached_tokens = usage[0], usage[1]
        told = {each["index"]: read_vector(each["embedding"]) for each in answer["data"]}
        vectors = [told[index] for index in range(self._prompt.n)]
        self.delivers = True
        for number, vector in enumerate(vectors, self._first):
            events: list[AnswerEvent] = [AnswerVector(number, "", values=vector), AnswerEnd(number, "stop")]
            await self._put(Piece(number, 0, events))

    async def _read_events(
        self, upstream: Upstream, response: ClientResponse, limit: asyncio.Timeout
    ) -> None:
        clock, silence = asyncio.get_running_loop().time, self._fleet.times.silence
        self._choices, self._total = self._new_choices(), None
        async for data in _sse_data(response):
            if data == b"[DONE]":
                break
            chunk = json.loads(data)
            if error := chunk.get("error"):
                raise _stream_error(error)
            await self._read_chunk(upstream, chunk, limit)
            limit.reschedule(clock() + (silence if self.delivers else self._fleet.times.first))
        if not all(choice.has_ended for choice in self._choices):
            text = "the upstream closed the stream before the end of the answer"
            raise _UpstreamFailed(_gateway_error(text))
        limit.reschedule(None)
        if self._total is not None:  # what the upstream says at the end counts
            self._choices[-1].tokens += self._total - sum(choice.tokens for choice in self._choices)
        for index, choice in enumerate(self._choices, self._first):
            await self._put(Piece(index, choice.tokens, choice.finish()))

    async def _read_chunk(self, upstream: Upstream, chunk: dict[str, Any], limit: asyncio.Timeout) -> None:
        """Deliver the events of a chunk."""
        usage, choices = told_usage(chunk), chunk.get("choices") or ()
        self._told_warnings += told_warnings(chunk)
        if usage is not None:
            self._told_prompt, self.cached_tokens = usage[0], usage[1]
            if not choices:
                self._total = usage[2]
        tells = usage is not None and len(choices) == 1 and upstream.tells_usage(self._model)
        for each in choices:
            number = int(each.get("index", 0))
            events = self._choices[number].feed(each, usage[2] if tells and usage else None)
            if events:
                self.delivers = True
                limit.reschedule(None)  # a client that reads slowly is not the upstream's fault
                await self._put(Piece(self._first + number, self._choices[number].tokens, events))

    def _new_choices(self) -> list[ChoiceReader]:
        return [ChoiceReader(self._first + n, self._prompt.tools) for n in range(self._prompt.n)]


def refusal(upstream: Upstream, response: ClientResponse, body: bytes) -> Exception:
    """Return the error for a response without an answer: the client's fault, or the upstream's."""
    status = response.status
    message, code = error_message(body)
    if status in (400, 413, 422):
        return BadRequest(message or "the upstream refused the request", code=code)
    if status in (429, 503, 529):
        wait = response.headers.get("retry-after", "")
        after = min(float(wait), 3600.0) if wait.isdecimal() and len(wait) < 9 else 2.0
        return _UpstreamFailed(Overloaded("the upstream is overloaded; try again later", retry_after=after))
    if status in (401, 403):
        log.error("upstream %s refuses the key in HERD_UPSTREAM_KEY (%d)", upstream.url, status)
    else:
        log.error("upstream %s answers with %d: %s", upstream.url, status, message[:300])
    return _UpstreamFailed(_gateway_error(f"the upstream failed with status {status}"))


def _stream_error(error: Any) -> Exception:
    """Return the error for an event in which an upstream tells of one."""
    message, _ = error_message(json.dumps({"error": error}).encode())
    code = error.get("code") if isinstance(error, Mapping) else None
    if code in (400, 413, 422):
        return BadRequest(message or "the upstream refused the request")
    return _UpstreamFailed(_gateway_error(f"the upstream failed: {message}"))


def _gateway_error(message: str, status: int = 502) -> ApiError:
    return ServerFault(message, status=status, code="upstream_failed")


async def _sse_data(response: ClientResponse) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event. Lines end with LF only: JSON may hold other line ends."""
    rest = b""
    data: list[bytes] = []
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_ANSWER:
            raise _gateway_error("an event of the upstream is too long")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
