"""The models of a server: loaded when a request names them, within a memory budget.

A request pins its model until its response has been sent. If a model does not fit next to those that are
loaded, the least recently used one is unloaded, if possible one that no request uses. If all are in use, it
takes no more requests and is unloaded when the last one has ended. A request that waits too long for this is
told to try again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from ..machine import return_freed_memory
from .chat import ANY_NAME
from .errors import ApiError, NotFound
from .problems import Overloaded
from .source import Servable

if TYPE_CHECKING:
    from ..engine.loop import EngineStats
    from .auth import Principal

log = logging.getLogger("herd.serve")

WAIT_SECONDS = 60.0
"""How long a request waits for memory that models in use occupy."""


@dataclass
class ModelSlot:
    """A model that a server can load.

    ``open`` loads it. ``nbytes`` are its weights and its cache in memory. ``context`` is in tokens. ``facts``
    are shown to clients that ask about the model. ``created`` is in seconds since 1970.
    """

    name: str
    open: Callable[[], Servable[Any]]
    nbytes: int = 0
    context: int = 0
    aliases: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    created: int = 0
    served: Servable[Any] | None = None
    users: int = 0
    is_leaving: bool = False
    last_used: float = 0.0
    n_loads: int = 0

    @classmethod
    def of(cls, served: Servable[Any]) -> ModelSlot:
        """Return the slot of a model that is loaded already and stays."""
        return cls(
            served.name,
            lambda: served,
            context=served.context,
            aliases=served.aliases,
            adapters=served.adapters,
            facts=served.facts,
            created=served.created,
            served=served,
        )


class ModelPool:
    """The models of a server. Without a limit in bytes, none is ever unloaded.

    All methods but `close` and `stats` belong to the server's event loop.
    """

    def __init__(
        self, slots: Sequence[ModelSlot], limit: int | None = None, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self.slots, self._limit, self._wait_seconds = list(slots), limit, wait_seconds
        self._is_loading = False
        self._next_change = asyncio.Event()

    def find(self, name: str | None) -> ModelSlot:
        """Return the model that clients call ``name``, or the first one if it is None. Raises `NotFound`."""
        if not self.slots:
            raise Overloaded("no upstream has told its models yet; try again later")
        if name in (None, ""):
            return self.slots[0]
        for slot in self.slots:
            if name == slot.name or name in slot.aliases | slot.adapters:
                return slot
        for slot in self.slots:
            if ANY_NAME in slot.aliases:
                return slot
        known = {each for slot in self.slots for each in (slot.name, *slot.aliases, *slot.adapters)}
        has = ", ".join(sorted(known))
        raise NotFound(f"the model {str(name)[:80]!r} does not exist; this server has: {has}")

    def is_upstream(self, name: object) -> bool:
        """Return whether a request that names its model so is for a model of another server."""
        with suppress(ApiError):
            if name is None or isinstance(name, str):
                served = self.find(name).served
                return served is not None and served.is_upstream
        return False

    def visible(self, principal: Principal) -> list[ModelSlot]:
        """Return the models that a key may use."""
        return [slot for slot in self.slots if principal.models is None or slot.name in principal.models]

    async def acquire(self, slot: ModelSlot) -> Servable[Any]:
        """Load a model if necessary and pin it until `release`. Raises `Overloaded` if it does not fit."""
        while slot.served is None or slot.is_leaving:
            if self._is_loading or slot.is_leaving:
                await self._next_change.wait()
                continue
            self._is_loading = True
            try:
                await self._make_room(slot)
                start = time.monotonic()
                slot.served = await run_in_threadpool(slot.open)
                log.info("%s is loaded in %.2f s", slot.name, time.monotonic() - start)
                slot.context, slot.n_loads = slot.served.context, slot.n_loads + 1
            finally:
                self._is_loading = False
                self._changed()
        slot.users += 1
        slot.last_used = time.monotonic()
        return slot.served

    def release(self, slot: ModelSlot) -> None:
        """Let a model be unloaded again, unless other requests use it."""
        slot.users -= 1
        slot.last_used = time.monotonic()
        self._changed()

    def _changed(self) -> None:
        """Wake everybody who waits for a change."""
        self._next_change.set()
        self._next_change = asyncio.Event()

    async def _make_room(self, wanted: ModelSlot) -> None:
        """Unload models until ``wanted`` fits. A model to unload takes no more requests."""
        deadline = time.monotonic() + self._wait_seconds
        while self._limit is not None:
            loaded = [slot for slot in self.slots if slot.served is not None]
            if sum(slot.nbytes for slot in loaded) + wanted.nbytes <= self._limit:
                return
            leaving = min(loaded, key=lambda slot: (slot.users > 0, slot.last_used))
            leaving.is_leaving = True
            try:
                while leaving.users:
                    await asyncio.wait_for(self._next_change.wait(), deadline - time.monotonic())
                await self._unload(leaving)
            except TimeoutError:
                names = ", ".join(slot.name for slot in loaded)
                raise Overloaded(
                    f"there is no memory for {wanted.name} while {names} are in use; try again later"
                ) from None
            finally:
                leaving.is_leaving = False

    async def _unload(self, slot: ModelSlot) -> None:
        served, slot.served = slot.served, None
        assert served is not None
        log.info("%s is unloaded to make room for another model", slot.name)
        await run_in_threadpool(served.close)
        del served
        gc.collect()  # the engine and its thread refer to each other
        return_freed_memory()

    def stats(self) -> dict[str, EngineStats]:
        """Return the state of the engine of each loaded model. Safe from any thread."""
        loaded = ((slot.name, slot.served) for slot in self.slots)
        stats = ((name, served.stats()) for name, served in loaded if served is not None)
        return {name: state for name, state in stats if state is not None}

    def close(self, drain_seconds: float = 0.0) -> None:
        """Let open answers finish for so long, and end all engines. Safe from any thread."""
        loaded = [served for slot in self.slots if (served := slot.served) is not None]
        threads = [threading.Thread(target=served.close, args=(drain_seconds,)) for served in loaded]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


async def use_model(request: Request, principal: Principal, name: str | None) -> Servable[Any]:
    """Return the model that a request names, loaded and pinned until its response has been sent.

    Raises `ApiError` if there is no such model, the key may not use it, or there is no memory for it.
    """
    pool: ModelPool = request.app.state.models
    slot = pool.find(name)
    principal.check_model(slot.name)
    request.state.model = name if name in slot.adapters else slot.name
    served = await pool.acquire(slot)
    request.scope["state"].setdefault("pinned", []).append(slot)
    return served.with_adapter(str(name)) if name in served.adapters else served
