"""Run an engine in a thread of its own, for servers: submit, read, cancel and count from any thread.

An `EngineLoop` owns its engine: only its thread touches the engine, and everybody else sends it messages. The
thread runs steps while there are requests. Each request is a `Generation`, whose deltas are read from asyncio
(``async for``) or from any thread (``for``). Constraints are compiled in other threads, so that a large
schema delays only its own request. A failure of one request, or of a whole step, is raised to the readers
concerned, and the thread goes on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import EngineBusyError, EngineError
from ..kernels.page_layout import PAGE
from .constraint import Guide
from .engine import Engine, copies
from .pacing import Pacer
from .request import Delta, Request
from .saved_pages import SavedPages
from .stream import ResponseStream

COMPILING_THREADS = 2
"""Threads that compile constraints, at most one at a time of each owner."""
RATE_SECONDS = 10.0
"""Time over which tokens per second are averaged."""

Waiter = threading.Event | tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]
"""What a reader in a thread, or in an event loop, waits for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing now, and its counts since the start. Rates are over the last seconds.

    ``cached_tokens`` is the number of tokens in pages that a prompt can find by their content.
    """

    active: int
    waiting: int
    free_pages: int
    used_pages: int
    cached_tokens: int
    steps: int
    preemptions: int
    decoded_tokens: int
    prefilled_tokens: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float


class Generation(ResponseStream, AsyncIterator[Delta]):
    """The deltas of one request to an `EngineLoop`. Safe from any thread, but for one reader at a time.

    `cancel` frees the pages within one step. The last delta then says "cancelled", unless the answer had
    already ended.
    """

    def __init__(
        self,
        request: Request,
        cancel: Callable[[ResponseStream], None],
        arrived: Callable[[Generation], None],
    ) -> None:
        super().__init__(request, lambda: False, cancel)
        self._arrived = arrived
        self._lock = threading.Lock()
        self._waiter: Waiter | None = None
        self._compiled: Future[None] = Future()

    async def __anext__(self) -> Delta:
        while not self._readable():
            loop = asyncio.get_running_loop()
            arrived: asyncio.Future[None] = loop.create_future()
            if self._must_wait((loop, arrived)):
                await arrived
        try:
            return self._read()
        except StopIteration:
            raise StopAsyncIteration from None

    async def ready(self) -> None:
        """Wait until the constraint, if any, is compiled. Raises EngineError if it cannot be followed."""
        await asyncio.shield(asyncio.wrap_future(self._compiled))

    def settle(self, error: Exception | None = None) -> None:
        """Note that the constraint is compiled, failed with ``error``, or is not needed any more."""
        with suppress(InvalidStateError):  # cancelled meanwhile
            if error is None:
                self._compiled.set_result(None)
            else:
                self._compiled.set_exception(error)

    def push(self, delta: Delta) -> None:
        super().push(delta)
        self._arrived(self)

    def fail(self, error: EngineError) -> None:
        super().fail(error)
        self._arrived(self)

    def take_waiter(self) -> Waiter | None:
        """Return the reader's waiter and forget it. None if the reader does not wait."""
        with self._lock:
            waiter, self._waiter = self._waiter, None
        return waiter

    def _wait(self) -> None:
        arrived = threading.Event()
        if self._must_wait(arrived):
            arrived.wait()

    def _must_wait(self, waiter: Waiter) -> bool:
        """Return whether the reader must wait. If so, the thread of the engine will find ``waiter``."""
        with self._lock:
            if self._readable():
                return False
            self._waiter = waiter
            return True


class EngineLoop:
    """A thread that runs ``engine``. Nobody else may use the engine from now on.

    At most ``max_waiting`` requests may wait for their turn. ``cache_folder`` keeps the pages of computed
    prompts for the next start (`saved_pages.py`). Call `close`, or use it in a ``with`` block.
    """

    def __init__(
        self, engine: Engine, max_waiting: int = 512, cache_folder: str | Path | None = None
    ) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        engine.pacer = Pacer()
        if cache_folder is not None:
            engine.saved_pages = SavedPages(cache_folder, engine.cache, engine.model)
            engine.saved_pages.load()
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._arrived: list[Generation] = []
        self._lock = threading.Lock()
        self._open: set[Generation] = set()  # not yet at their end
        self._closing = self._closed = False
        self._deadline = float("inf")
        self._rates = deque([(time.monotonic(), 0, 0)])  # time, tokens decoded, tokens prefilled
        self._compiling: dict[str, deque[Generation]] = {}  # of each owner, the first one is in the pool
        self._compilers = ThreadPoolExecutor(COMPILING_THREADS, "herd-constraint")
        self._thread = threading.Thread(target=self._run, name="herd-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, n: int = 1) -> list[Generation]:
        """Queue ``n`` answers to a request.

        Raises EngineError if the request is invalid, and EngineBusyError if too many wait or the loop is
        closing. A constraint that cannot be followed fails later: the first delta, or `Generation.ready`.
        """
        requests = copies(request, n)
        self.engine.check(request)
        generations = [Generation(each, self._cancel, self._arrived.append) for each in requests]
        with self._lock:
            if self._closing:
                raise EngineBusyError("the engine is closing and takes no more requests")
            waiting = self._n_waiting()
            if waiting + n > self.max_waiting:
                raise EngineBusyError(
                    f"{waiting} requests wait for the engine, and {n} more would exceed its limit of "
                    f"{self.max_waiting}: try again later"
                )
            self._open.update(generations)
            for generation in generations:
                if request.constraint is None:
                    generation.settle()
                    self._messages.put(partial(self._start, generation, None))
                    continue
                compiling = self._compiling.setdefault(request.owner, deque())
                compiling.append(generation)
                if len(compiling) == 1:
                    self._compilers.submit(self._compile, generation)
        return generations

    def stats(self) -> EngineStats:
        """Return the numbers of requests, pages and tokens, and the rates, at this moment."""
        engine, pages = self.engine, self.engine.cache.pages
        with self._lock:
            waiting = self._n_waiting()
        then, decoded, prefilled = self._rates[0]
        seconds = max(time.monotonic() - then, 1e-9)
        return EngineStats(
            active=engine.n_active,
            waiting=waiting,
            free_pages=max(0, pages.available),
            used_pages=pages.n_used,
            cached_tokens=pages.n_findable * PAGE,
            steps=engine.n_steps,
            preemptions=engine.n_preempted,
            decoded_tokens=engine.n_decoded,
            prefilled_tokens=engine.n_prefilled,
            decode_tokens_per_second=(engine.n_decoded - decoded) / seconds,
            prefill_tokens_per_second=(engine.n_prefilled - prefilled) / seconds,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let the open ones finish for ``drain_seconds``, cancel the rest, and return
        when the threads have ended."""
        with self._lock:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + drain_seconds)
        self._messages.put(lambda: None)
        self._thread.join()
        with self._lock:
            self._closed = True
        self._compilers.shutdown(cancel_futures=True)
        if self.engine.saved_pages is not None:
            self.engine.saved_pages.close()

    def _cancel(self, stream: ResponseStream) -> None:
        self._messages.put(partial(self._end, stream))

    def _n_waiting(self) -> int:
        return sum(not generation.began for generation in self._open)

    def _compile(self, generation: Generation) -> None:
        """Compile a constraint, in a thread of the pool, and then let the next one of its owner follow."""
        message: Callable[[], None]
        try:
            guide = None if generation.done else self.engine.compile(generation.request.constraint)
            generation.settle()
            message = partial(self._start, generation, guide)
        except Exception as error:
            problem = f"compiling a constraint failed: {type(error).__name__}: {error}"
            error = error if isinstance(error, EngineError) else EngineError(problem)
            generation.settle(error)
            message = partial(self._fail, generation, error)
        self._messages.put(message)
        with self._lock:
            compiling = self._compiling[generation.request.owner]
            compiling.popleft()
            if not compiling:
                del self._compiling[generation.request.owner]
            elif not self._closed:
                self._compilers.submit(self._compile, compiling[0])

    # the methods below run in the thread of the engine

    def _run(self) -> None:
        try:
            while not self._ended():
                try:
                    self.engine.step()
                except Exception:
                    _log.exception("a step of the engine failed; its requests ended with an error")
                self._note_rates()
                self._wake_readers()
        finally:  # a bug ends the thread: nobody may wait for it
            with self._lock:
                self._closing = True
            for generation in self._open:
                generation.fail(EngineError("the thread of the engine has ended: restart the server"))
                _wake([generation])

    def _ended(self) -> bool:
        """Take the messages, and return whether the loop is closed and nothing is open."""
        self._take_messages()
        if not self._closing:
            return False
        if time.monotonic() >= self._deadline:
            for generation in list(self._open):
                self._end(generation)
        self._wake_readers()
        return not self._open

    def _take_messages(self) -> None:
        """Run all messages. If there is no request to compute, wait for one."""
        busy = self.engine.n_active or self.engine.n_waiting or self._arrived
        idle = not busy and not (self._closing and not self._open)
        with suppress(queue.Empty):
            if idle:
                wait = None
                if self._closing:
                    wait = max(0.0, min(self._deadline - time.monotonic(), threading.TIMEOUT_MAX))
                self._messages.get(timeout=wait)()
            while True:
                self._messages.get_nowait()()

    def _start(self, generation: Generation, guide: Guide | None) -> None:
        if not generation.done:  # cancelled while its constraint was compiled
            self.engine.enqueue(generation, guide)

    def _fail(self, generation: Generation, error: EngineError) -> None:
        if not generation.done:
            generation.fail(error)

    def _end(self, stream: ResponseStream) -> None:
        self.engine.cancel(stream)
        if not stream.done:  # not queued yet
            stream.push(Delta("", (), "cancelled"))
        if isinstance(stream, Generation):
            stream.settle()

    def _wake_readers(self) -> None:
        arrived = set(self._arrived)
        self._arrived.clear()
        ended = {generation for generation in arrived if generation.done}
        if ended:
            with self._lock:
                self._open -= ended
        _wake(arrived)

    def _note_rates(self) -> None:
        now = time.monotonic()
        if now - self._rates[-1][0] > RATE_SECONDS / 20:
            self._rates.append((now, self.engine.n_decoded, self.engine.n_prefilled))
        while len(self._rates) > 1 and now - self._rates[1][0] > RATE_SECONDS:
            self._rates.popleft()


def _wake(generations: Iterable[Generation]) -> None:
    """Wake the readers of these generations that wait, with one call for each event loop."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for generation in generations:
        waiter = generation.take_waiter()
        if isinstance(waiter, threading.Event):
            waiter.set()
        elif waiter is not None:
            futures.setdefault(waiter[0], []).append(waiter[1])
    for loop, some in futures.items():
        with suppress(RuntimeError):  # the event loop of these readers is closed
            loop.call_soon_threadsafe(_resolve, some)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
