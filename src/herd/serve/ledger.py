"""The ledger: the most that each request may use, and exactly what it used.

A request *reserves* the most that it can use in one transaction, which also checks the key's limits
(`limits.py`). So two requests cannot both be admitted on what is left of one budget. It is *settled* once, in
one transaction that replaces the reservation by what was used. Between the two, its counter (`counters.py`)
is advanced before each write to the client. After `kill -9` the client is therefore billed for what it
received and at most one chunk more.

Completion tokens are the tokens sampled for the request up to and including the last one that was delivered
or belongs to a stop string. A request whose counter was never advanced got no part of an answer, and is not
billed. It still counts towards the key's requests and tokens per minute.

A request that runs tools on the server has several steps, and each step calls the model again. Every step is
reserved when it begins, has its own row and counter, and is settled with the request. Only the first step
counts as a request.

If the store is unavailable, new requests are refused (503). Open requests go on, and are settled when the
store is available again, or by `recover` from their counters when the next server starts.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sql

from .auth import Principal
from .counters import PROMPT, SUFFIX, CounterFile, counters_of_dead, pack, unpack
from .errors import DuplicateRequest, StoreError, Unauthorized
from .keys import key_by_id
from .leases import BEAT_SECONDS, LEASE_SECONDS, Leases
from .limits import check_budgets, check_rates
from .prices import FREE, TokenPrice, format_money, price_of, read_currency
from .statements import (
    CHANGE_REQUEST,
    FORGET_REQUEST,
    INSERT_REQUEST,
    LOCK_KEY,
    OPEN_REQUEST,
    SAME_ID,
    STEP_MARK,
    add_to_day,
)
from .store import Store, data_folder, now_ms
from .tables import requests
from .usage import day_of

log = logging.getLogger("herd.serve")
Status = Literal["completed", "cancelled", "failed", "crashed", "lost"]
"""How a request ended. crashed: its server died. lost: its server died and the counters are gone."""


@dataclass(frozen=True)
class Bill:
    """The billed tokens of a request, and the money in millionths. ``prompt_tokens`` include cached ones."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    money: int = 0


class Reservation:
    """An open request in the ledger. Call `advance` before each write to the client, and `settle` at the end.

    ``words[slot]`` is its counter (see `counters.pack`), and ``words[prompt_slot]`` that of its prompt. In
    all methods a ``prompt_tokens`` of 0 means the reserved number.
    """

    def __init__(
        self,
        words: memoryview,
        slot: int,
        prompt_slot: int,
        prompt_tokens: int,
        price: TokenPrice,
        on_settle: Callable[[int, int, Status], None],
        currency: str | None = None,
        on_shrink: Callable[[int], None] = lambda completion_tokens: None,
    ) -> None:
        self._words, self._slot, self._prompt_slot = words, slot, prompt_slot
        self._on_settle, self._on_shrink, self._currency = on_settle, on_shrink, currency
        self._prompt_tokens, self._price = prompt_tokens, price
        self._bill: Bill | None = None

    def advance(self, completion_tokens: int, cached_tokens: int = 0, prompt_tokens: int = 0) -> None:
        """Set the counter to the tokens that the client will have received after the next write."""
        if self._bill is not None:
            raise RuntimeError("a request was advanced after it was settled")
        self._words[self._prompt_slot] = prompt_tokens
        self._words[self._slot] = pack(completion_tokens, cached_tokens)

    def bill(self, completion_tokens: int, cached_tokens: int = 0, prompt_tokens: int = 0) -> Bill:
        """Return the bill for these tokens, e.g. to show its money in an answer."""
        prompt_tokens = prompt_tokens or self._prompt_tokens
        money = self._price.cost(prompt_tokens, cached_tokens, completion_tokens)
        return Bill(prompt_tokens, cached_tokens, completion_tokens, money)

    def cost(
        self, completion_tokens: int, cached_tokens: int = 0, prompt_tokens: int = 0
    ) -> dict[str, str] | None:
        """Return the money for these tokens as clients see it, or None if the model has no price."""
        if self._currency is None:
            return None
        money = self.bill(completion_tokens, cached_tokens, prompt_tokens).money
        return {"amount": format_money(money), "currency": self._currency}

    def shrink(self, completion_tokens: int) -> None:
        """Reduce the reservation to what was generated, because this step has ended. Waits for the store."""
        self._on_shrink(completion_tokens)

    def settle(
        self,
        completion_tokens: int,
        cached_tokens: int = 0,
        status: Status = "completed",
        prompt_tokens: int = 0,
    ) -> Bill:
        """End the request and return its bill, which is empty if `advance` was never called.

        A second call returns the same bill. If the store is unavailable, the bill is stored later.
        """
        if self._bill is None:
            begun = unpack(self._words[self._slot])[0]
            word = pack(completion_tokens, cached_tokens) if begun else completion_tokens
            self._words[self._prompt_slot] = prompt_tokens
            if begun:
                self._words[self._slot] = word
            self._bill = self.bill(completion_tokens, cached_tokens, prompt_tokens) if begun else Bill()
            self._on_settle(word, prompt_tokens, status)
        return self._bill


class Unmetered:
    """The ledger of a server without keys: admits everything and stores nothing."""

    def reserve(self, principal: Principal, *, prompt_tokens: int, **_: Any) -> Reservation:
        """Return a reservation at no price. The other arguments are those of `Ledger.reserve`."""
        return Reservation(memoryview(bytearray(16)).cast("Q"), 0, 1, prompt_tokens, FREE, lambda *_: None)

    def close(self) -> None:
        """Do nothing, as there is nothing to store."""


@dataclass(frozen=True)
class _OpenRequest:
    """The columns that identify the row of an open request."""

    key_id: str
    id: str
    server: str
    slot: int


class Ledger:
    """The ledger in a store, safe from any thread.

    ``folder`` has the counter files of this machine's servers. A store by URL may be shared by servers on
    several machines, which watch each other's heartbeats (`leases.py`). If a machine is lost, so are its
    counters, and its open requests are not billed.
    """

    def __init__(
        self,
        store: Store,
        folder: Path | None = None,
        clock: Callable[[], int] = now_ms,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._store, self._clock = store, clock
        self._folder = folder or _counter_folder(store)
        host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())[:60]
        self._server = f"{host}_{os.getpid()}_{secrets.token_hex(8)}"
        self._counters = CounterFile(self._folder / f"{self._server}{SUFFIX}")
        self._unsettled: list[tuple[_OpenRequest, int, int, Status]] = []
        self._lock = threading.Lock()
        self._leases: Leases | None = None
        if store.path is None:
            beat_seconds = min(BEAT_SECONDS, lease_seconds / 4)
            self._leases = Leases(store, self._server, self._settle_dead, beat_seconds, lease_seconds)

    def reserve(
        self,
        principal: Principal,
        *,
        model: str,
        endpoint: str,
        prompt_tokens: int,
        max_completion_tokens: int,
        request_id: str,
        step: int = 1,
    ) -> Reservation:
        """Admit a request and reserve the most that it can use, or raise one of the errors of `errors.py`.

        ``max_completion_tokens`` is the sum over all answers to the prompt. ``request_id`` is unique among
        the key's requests, but the id of a request that was not billed can be used again. ``step`` counts the
        steps of a request from 1. Later steps need an id of their own, and count towards limits of tokens and
        money but not as requests.
        """
        self._retry()
        if step > 1:
            endpoint = f"{endpoint}{STEP_MARK}{step}"
        slot = self._counters.take()
        request = _OpenRequest(principal.key_id, request_id, self._server, slot)
        try:
            with self._store.write() as connection:
                price = self._admit(
                    connection, request, model, endpoint, prompt_tokens, max_completion_tokens
                )
                currency = None if price is FREE else read_currency(connection)
        except StoreError:  # the commit may have succeeded and only its answer was lost
            with self._lock:
                self._unsettled.append((request, 0, 0, "failed"))
            raise
        except BaseException:
            self._counters.give_back(slot)
            raise
        return Reservation(
            self._counters.words,
            slot,
            slot + PROMPT,
            prompt_tokens,
            price,
            partial(self._settle_or_keep, request),
            currency,
            partial(self._shrink, request),
        )

    def recover(self) -> int:
        """Settle the requests that dead servers left open, from their counters. Return their number."""
        count = 0
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            if path == self._counters.path:
                continue
            server = path.name.removesuffix(SUFFIX)
            if (settled := self._recover_from(path, server)) is not None and self._leases is not None:
                self._leases.forget(server)
            count += settled or 0
        if self._store.path is not None:  # all servers on a file are on this machine
            for server in {row.server for row in self._open_rows(sql.true())}:
                count += self._settle_dead(server)
        return count

    def _recover_from(self, path: Path, server: str) -> int | None:
        """Settle the open requests of a dead server from its counters and return their number.

        Returns None if the server is alive or the file is gone.
        """
        with counters_of_dead(path) as words:
            if words is None:
                return None
            count = 0
            for row in self._open_rows(requests.c.server == server):
                request = _OpenRequest(row.key_id, row.id, server, row.slot)
                count += self._settle(request, words[row.slot], words[row.slot + PROMPT], "crashed")
            path.unlink(missing_ok=True)
        return count

    def _settle_dead(self, server: str) -> int:
        """Settle the open requests of a dead server. Return their number.

        If its counters are not on this machine, the requests are not billed.
        """
        path = self._folder / f"{server}{SUFFIX}"
        if path.exists():
            return self._recover_from(path, server) or 0
        count = 0
        for row in self._open_rows(requests.c.server == server):
            log.warning("request %s of key %s is not billed: its counters are gone", row.id, row.key_id)
            count += self._settle(_OpenRequest(row.key_id, row.id, row.server, row.slot), 0, 0, "lost")
        return count

    def close(self) -> None:
        """Settle what is not settled yet. What cannot be settled now is left to the next `recover`."""
        self._retry()
        if self._leases is not None:
            self._leases.close(signs_off=not self._unsettled)
        if not self._counters.close():
            log.warning("some requests are not settled; the next server on this store settles them")

    def _admit(
        self,
        connection: sql.Connection,
        request: _OpenRequest,
        model: str,
        endpoint: str,
        prompt_tokens: int,
        max_completion_tokens: int,
    ) -> TokenPrice:
        """Check all limits of the key and insert the request, in one transaction that has locked the key."""
        now, tokens = self._clock(), prompt_tokens + max_completion_tokens
        info = key_by_id(connection, request.key_id)
        if info is None or info.state(now) != "active":
            raise Unauthorized("this key is not valid any more")
        _refuse_duplicate(connection, request)
        check_rates(connection, info, tokens, now, is_first_step=STEP_MARK not in endpoint)
        price = price_of(connection, model)
        money = (price or FREE).worst_cost(prompt_tokens, max_completion_tokens)
        check_budgets(connection, info, model, price, tokens, money, now)
        day = day_of(now)
        reserved = {"reserved_tokens": tokens, "reserved_money": money}
        row = vars(request) | reserved | {
            "model": model, "endpoint": endpoint, "status": "open", "day": day, "created_ms": now,
            "prompt_tokens": prompt_tokens, "cached_tokens": 0, "completion_tokens": 0, "tokens": tokens,
            "price": asdict(price) if price else None, "money": 0,
        }  # fmt: skip
        connection.execute(INSERT_REQUEST, row)
        add_to_day(connection, request.key_id, day, model, reserved)
        return price or FREE

    def _shrink(self, request: _OpenRequest, completion_tokens: int) -> None:
        """Reduce the reservation of an open request to what it has used."""
        with self._store.write() as connection:
            connection.execute(LOCK_KEY, {"key_id": request.key_id})
            row = connection.execute(OPEN_REQUEST, vars(request)).first()
            if row is None:
                return
            price = TokenPrice(**row.price) if row.price else FREE
            tokens = row.prompt_tokens + completion_tokens
            money = price.worst_cost(row.prompt_tokens, completion_tokens)
            kept = {"tokens": tokens, "reserved_tokens": tokens, "reserved_money": money}
            connection.execute(CHANGE_REQUEST, kept | {"at_key": request.key_id, "at_id": request.id})
            freed = {
                "reserved_tokens": tokens - row.reserved_tokens,
                "reserved_money": money - row.reserved_money,
            }
            add_to_day(connection, request.key_id, row.day, row.model, freed)

    def _settle_or_keep(self, request: _OpenRequest, word: int, prompt_tokens: int, status: Status) -> None:
        """Settle a request of this server, or keep it for `_retry` if the store is unavailable."""
        try:
            self._settle(request, word, prompt_tokens, status)
        except StoreError as error:
            log.warning("request %s will be settled later: %s", request.id, error)
            with self._lock:
                self._unsettled.append((request, word, prompt_tokens, status))
        else:
            self._counters.give_back(request.slot)

    def _retry(self) -> None:
        """Settle what could not be settled while the store was unavailable."""
        while self._unsettled:
            with self._lock:
                if not self._unsettled:
                    return
                request, word, prompt_tokens, status = self._unsettled.pop()
            self._settle_or_keep(request, word, prompt_tokens, status)
            with self._lock:
                if self._unsettled and self._unsettled[-1][0] == request:  # the store is still unavailable
                    return

    def _settle(self, request: _OpenRequest, word: int, prompt_tokens: int, status: Status) -> bool:
        """Replace a reservation by what was used, once. Return whether it was still open."""
        begun, completion, cached = unpack(word)
        with self._store.write() as connection:
            # Without the key's lock two transactions could insert the same row of `days` (in PostgreSQL:
            # SQLite runs one write transaction at a time).
            connection.execute(LOCK_KEY, {"key_id": request.key_id})
            row = connection.execute(OPEN_REQUEST, vars(request)).first()
            if row is None:
                return False
            price = TokenPrice(**row.price) if row.price else FREE
            prompt_tokens = prompt_tokens or row.prompt_tokens
            cost = price.cost(prompt_tokens, cached, completion)
            bill = vars(Bill(prompt_tokens, cached, completion, cost) if begun else Bill())
            settled = bill | {
                "at_key": request.key_id, "at_id": request.id, "status": status, "settled_ms": self._clock(),
                "tokens": prompt_tokens + completion, "reserved_tokens": 0, "reserved_money": 0,
            }  # fmt: skip
            connection.execute(CHANGE_REQUEST, settled)
            freed = {"reserved_tokens": -row.reserved_tokens, "reserved_money": -row.reserved_money}
            counted = {"requests": int(begun and STEP_MARK not in row.endpoint)}
            add_to_day(connection, request.key_id, row.day, row.model, bill | freed | counted)
        return True

    def _open_rows(self, condition: sql.ColumnElement[bool]) -> list[sql.Row]:
        with self._store.read() as connection:
            select = sql.select(requests).where(requests.c.status == "open", condition)
            return list(connection.execute(select))


def _counter_folder(store: Store) -> Path:
    """Return the folder of counter files beside the store's file, or for a URL in the user's data folder."""
    if store.path is not None:
        return store.path.with_name(f"{store.path.name}{SUFFIX}")
    return data_folder() / "counters"


def _refuse_duplicate(connection: sql.Connection, request: _OpenRequest) -> None:
    """Raise `DuplicateRequest` if the id is in use. Forget an earlier request that billed nothing."""
    same = {"key_id": request.key_id, "id": request.id}
    earlier = connection.execute(SAME_ID, same).first()
    if earlier is None:
        return
    if earlier.status == "open":
        raise DuplicateRequest("a request with this id is in progress", retry_after=1.0)
    if earlier.prompt_tokens:
        raise DuplicateRequest("a request with this id was answered and billed; use a new id")
    connection.execute(FORGET_REQUEST, same)
