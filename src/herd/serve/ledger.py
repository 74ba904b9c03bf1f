"""The ledger: what each request may use at most, and what it did use, exactly.

A request *reserves* its worst case in one transaction, which also checks the key's limits. Two requests can
therefore never be admitted on the same money. It is *settled* once, in one transaction that replaces the
reservation by what was used. In between its counter is advanced before each write to the client
(`counters.py`), so after `kill -9` the bill lies between what the client received and one chunk more.

Completion tokens are the tokens sampled for the request up to and including the last one that was delivered
or used up as stop text. A request whose counter was never advanced had no byte of an answer, and bills
nothing. It still counts towards the key's requests and tokens per minute.

A request that runs tools on the server has several steps, and each asks the model anew. Every step is
reserved when it begins, has a row and a counter of its own, and is settled with the request. Only the first
counts as a request.

If the store is away, new requests are refused (503). Requests that are open finish, and are settled once the
store is back, or by `recover` from their counters when the next server starts.
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
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import sqlalchemy as sql

from .auth import Principal
from .counters import PROMPT, SUFFIX, CounterFile, counters_of_dead, pack, unpack
from .errors import BudgetExceeded, DuplicateRequest, RateLimited, StoreError, TooManyConcurrent, Unauthorized
from .keys import KeyInfo, TokenBudget, key_by_id
from .leases import BEAT_SECONDS, LEASE_SECONDS, Leases
from .prices import FREE, TokenPrice, format_money, price_of, read_currency
from .statements import (
    CHANGE_REQUEST,
    COUNT_OPEN,
    FORGET_REQUEST,
    INSERT_REQUEST,
    IS_FIRST_STEP,
    LOCK_KEY,
    OPEN_REQUEST,
    RECENT_BY_AGE,
    SAME_ID,
    STEP_MARK,
    SUM_RECENT,
    add_to_day,
    spent,
)
from .store import Store, data_folder, now_ms
from .tables import meta, requests
from .usage import day_of

log = logging.getLogger("herd.serve")
Status = Literal["completed", "cancelled", "failed", "crashed", "lost"]
"""How a request ended. crashed: its server died. lost: its server died and the counters are gone."""
MINUTE_MS = 60_000


@dataclass(frozen=True)
class Bill:
    """The billed tokens of a request, and the money in millionths. ``prompt_tokens`` include cached ones."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    money: int = 0


class Reservation:
    """An open request in the ledger. `advance` before each write to the client, `settle` once at the end.

    In all methods ``prompt_tokens`` is the true number if it differs from the reserved one, else 0.
    """

    def __init__(
        self,
        words: memoryview,
        slot: int,
        prompt_slot: int,
        prompt_tokens: int,
        price: TokenPrice,
        close: Callable[[int, int, Status], None],
        currency: str | None = None,
        shrink: Callable[[int], None] = lambda completion_tokens: None,
    ) -> None:
        self._words, self._slot, self._prompt_slot = words, slot, prompt_slot
        self._close, self._currency = close, currency
        self._shrink = shrink
        self._prompt_tokens, self._price = prompt_tokens, price
        self._bill: Bill | None = None

    def advance(self, completion_tokens: int, cached_tokens: int = 0, prompt_tokens: int = 0) -> None:
        """Note the completion tokens that the client has once the next write has succeeded."""
        if self._bill is not None:
            raise RuntimeError("a request was advanced after it was settled")
        self._words[self._prompt_slot] = prompt_tokens
        self._words[self._slot] = pack(completion_tokens, cached_tokens)

    def bill(self, completion_tokens: int, cached_tokens: int = 0, prompt_tokens: int = 0) -> Bill:
        """Return the bill for so many tokens, e.g. to show its money in an answer."""
        prompt_tokens = prompt_tokens or self._prompt_tokens
        money = self._price.cost(prompt_tokens, cached_tokens, completion_tokens)
        return Bill(prompt_tokens, cached_tokens, completion_tokens, money)

    def cost(
        self, completion_tokens: int, cached_tokens: int = 0, prompt_tokens: int = 0
    ) -> dict[str, str] | None:
        """Return the money for so many tokens as clients are shown it. None: the model has no price."""
        if self._currency is None:
            return None
        money = self.bill(completion_tokens, cached_tokens, prompt_tokens).money
        return {"amount": format_money(money), "currency": self._currency}

    def shrink(self, completion_tokens: int) -> None:
        """Reserve no more than what was generated, because this step of the request has ended. Blocking."""
        self._shrink(completion_tokens)

    def settle(
        self,
        completion_tokens: int,
        cached_tokens: int = 0,
        status: Status = "completed",
        prompt_tokens: int = 0,
    ) -> Bill:
        """End the request and return its bill, which is empty if nothing was advanced.

        A second call does nothing. If the store is away, the bill is kept, and stored later.
        """
        if self._bill is None:
            begun = unpack(self._words[self._slot])[0]
            word = pack(completion_tokens, cached_tokens) if begun else completion_tokens
            self._words[self._prompt_slot] = prompt_tokens
            if begun:
                self._words[self._slot] = word
            self._bill = self.bill(completion_tokens, cached_tokens, prompt_tokens) if begun else Bill()
            self._close(word, prompt_tokens, status)
        return self._bill


class Unmetered:
    """The ledger of a server without keys: admits everything and stores nothing."""

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
        """Return a reservation that bills no money."""
        return Reservation(memoryview(bytearray(16)).cast("Q"), 0, 1, prompt_tokens, FREE, lambda *_: None)

    def close(self) -> None:
        """Do nothing, as there is nothing to store."""


@dataclass(frozen=True)
class _Open:
    """The columns by which the row of an open request is found again."""

    key_id: str
    id: str
    server: str
    slot: int


class Ledger:
    """The ledger in a store, safe from any thread.

    ``folder`` has the counter files of this machine's servers. A store by URL may be shared by servers on
    several machines, which watch each other's signs of life (`leases.py`). If a machine is gone, so are its
    counters, and its open requests bill nothing.
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
        self._unsettled: list[tuple[_Open, int, int, Status]] = []
        self._lock = threading.Lock()
        self._leases: Leases | None = None
        if store.path is None:
            beat_seconds = min(BEAT_SECONDS, lease_seconds / 4)
            self._leases = Leases(store, self._server, self._release, beat_seconds, lease_seconds)

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

        ``step`` is the number of the step in its request. Later steps need an id of their own. They count
        towards limits of tokens and money, but not as requests.

        ``max_completion_tokens`` is the sum over all answers to the prompt. ``request_id`` is unique for the
        key. The id of a request that was settled without a bill can be used again.
        """
        self._retry()
        if step > 1:
            endpoint = f"{endpoint}{STEP_MARK}{step}"
        slot = self._counters.take()
        request = _Open(principal.key_id, request_id, self._server, slot)
        try:
            with self._store.write() as connection:
                price = self._admit(
                    connection, request, model, endpoint, prompt_tokens, max_completion_tokens
                )
                currency = None if price is FREE else read_currency(connection)
        except StoreError:  # perhaps the commit succeeded and only its answer was lost
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
            partial(self._end, request),
            currency,
            lambda completion_tokens: self._lower(request, completion_tokens),
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
                count += self._release(server)
        return count

    def _recover_from(self, path: Path, server: str) -> int | None:
        """Settle the open requests of a dead server from its counters, or return None.

        None: the server lives, or its file is gone.
        """
        with counters_of_dead(path) as words:
            if words is None:
                return None
            count = 0
            for row in self._open_rows(requests.c.server == server):
                request = _Open(row.key_id, row.id, server, row.slot)
                count += self._settle(request, words[row.slot], words[row.slot + PROMPT], "crashed")
            path.unlink(missing_ok=True)
        return count

    def _release(self, server: str) -> int:
        """Settle the open requests of a dead server. Return their number.

        If its counters are not on this machine, they bill nothing.
        """
        path = self._folder / f"{server}{SUFFIX}"
        if path.exists():
            return self._recover_from(path, server) or 0
        count = 0
        for row in self._open_rows(requests.c.server == server):
            log.warning("request %s of key %s: its counters are gone, it bills nothing", row.id, row.key_id)
            count += self._settle(_Open(row.key_id, row.id, row.server, row.slot), 0, 0, "lost")
        return count

    def close(self) -> None:
        """Store what is not stored yet. What cannot be stored now is settled by the next `recover`."""
        self._retry()
        if self._leases is not None:
            self._leases.close(signs_off=not self._unsettled)
        if not self._counters.close():
            log.warning("some requests are not settled; the next server on this store settles them")

    def _admit(
        self,
        connection: sql.Connection,
        request: _Open,
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
        _check_rates(connection, info, tokens, now, is_first_step=STEP_MARK not in endpoint)
        price = price_of(connection, model)
        money = (price or FREE).worst_cost(prompt_tokens, max_completion_tokens)
        for budget in info.policy.budgets:
            if budget.unit == "money" and price is None:
                raise BudgetExceeded(
                    f"this key has a budget in money, and the model {model!r} has no price; "
                    "the operator sets it with: herd keys price"
                )
            _check_budget(connection, info, budget, tokens if budget.unit == "tokens" else money, now)
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

    def _lower(self, request: _Open, completion_tokens: int) -> None:
        """Reserve only what an open request has used."""
        with self._store.write() as connection:
            connection.execute(LOCK_KEY, {"key_id": request.key_id})
            row = connection.execute(OPEN_REQUEST, vars(request)).first()
            if row is None:
                return
            price = TokenPrice(**row.price) if row.price else FREE
            tokens = row.prompt_tokens + completion_tokens
            money = price.worst_cost(row.prompt_tokens, completion_tokens)
            now = {"tokens": tokens, "reserved_tokens": tokens, "reserved_money": money}
            connection.execute(CHANGE_REQUEST, now | {"at_key": request.key_id, "at_id": request.id})
            freed = {
                "reserved_tokens": tokens - row.reserved_tokens,
                "reserved_money": money - row.reserved_money,
            }
            add_to_day(connection, request.key_id, row.day, row.model, freed)

    def _end(self, request: _Open, word: int, prompt_tokens: int, status: Status) -> None:
        """Settle a request of this server, or keep it for later if the store is away."""
        try:
            self._settle(request, word, prompt_tokens, status)
        except StoreError as error:
            log.warning("request %s will be settled later: %s", request.id, error)
            with self._lock:
                self._unsettled.append((request, word, prompt_tokens, status))
        else:
            self._counters.give_back(request.slot)

    def _retry(self) -> None:
        """Settle what could not be settled while the store was away."""
        while self._unsettled:
            with self._lock:
                if not self._unsettled:
                    return
                request, word, prompt_tokens, status = self._unsettled.pop()
            self._end(request, word, prompt_tokens, status)
            with self._lock:
                if self._unsettled and self._unsettled[-1][0] == request:  # the store is still away
                    return

    def _settle(self, request: _Open, word: int, prompt_tokens: int, status: Status) -> bool:
        """Replace a reservation by what was used, once. Return whether it was still open."""
        begun, completion, cached = unpack(word)
        with self._store.write() as connection:
            # Without the key's lock two transactions could add the same row of `days`. SQLite has one at a
            # time.
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


def _refuse_duplicate(connection: sql.Connection, request: _Open) -> None:
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


def _check_rates(
    connection: sql.Connection, info: KeyInfo, tokens: int, now: int, *, is_first_step: bool
) -> None:
    """Raise if the key has too many requests open, or too many requests or tokens within the last minute."""
    policy = info.policy
    if policy.concurrent is not None and is_first_step:
        n_open = connection.execute(COUNT_OPEN, {"key_id": info.id}).scalar_one()
        if n_open >= policy.concurrent:
            raise TooManyConcurrent(f"this key may have {policy.concurrent} requests open at a time")
    if policy.requests_per_minute is None and policy.tokens_per_minute is None:
        return
    # Requests from the future (the clock was set back) count for a minute at most.
    window = {"key_id": info.id, "first": now - MINUTE_MS + 1, "last": now + MINUTE_MS}
    count, used = connection.execute(SUM_RECENT, window).one()
    limit = policy.requests_per_minute
    if limit is not None and count >= limit and is_first_step:
        firsts = connection.execute(RECENT_BY_AGE.where(IS_FIRST_STEP), window).all()
        last_to_leave = firsts[count - limit]
        raise RateLimited(
            f"this key may send {limit} requests per minute", _seconds_left(last_to_leave.created_ms, now)
        )
    limit = policy.tokens_per_minute
    if limit is None or (excess := int(used) + tokens - limit) <= 0:
        return
    for row in connection.execute(RECENT_BY_AGE, window):
        excess -= row.tokens
        if excess <= 0:
            raise RateLimited(
                f"this key may use {limit} tokens per minute", _seconds_left(row.created_ms, now)
            )
    raise RateLimited(
        f"this request may use {tokens} tokens, and the key {limit} per minute: lower max_tokens", None
    )


def _check_budget(
    connection: sql.Connection, info: KeyInfo, budget: TokenBudget, worst: int, now: int
) -> None:
    """Raise `BudgetExceeded` if the worst case is more than what is neither used nor reserved."""
    used, reserved = spent(connection, info.id, budget.unit, budget.period, now)
    left = budget.amount - used - reserved
    if worst <= left:
        return
    currency = connection.execute(sql.select(meta.c.currency)).scalar_one() or ""

    def show(amount: int) -> str:
        return f"{amount} tokens" if budget.unit == "tokens" else f"{format_money(amount)} {currency}".strip()

    open_part = f", {show(reserved)} are reserved by open requests" if reserved else ""
    raise BudgetExceeded(
        f"the budget of {show(budget.amount)} per {budget.period} has {show(max(left, 0))} left{open_part}, "
        f"and this request may use {show(worst)}: lower max_tokens, or wait until {_next_period(budget, now)}"
    )


def _next_period(budget: TokenBudget, now: int) -> str:
    """Return the time at which a budget starts again."""
    today = datetime.fromtimestamp(now / 1000, UTC).date()
    tomorrow, next_month = today + timedelta(days=1), today.replace(day=1) + timedelta(days=32)
    return f"{tomorrow if budget.period == 'day' else next_month.replace(day=1)} 00:00 UTC"


def _seconds_left(created_ms: int, now: int) -> float:
    return max(created_ms + MINUTE_MS - now, 1) / 1000
