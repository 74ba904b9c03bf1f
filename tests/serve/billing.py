"""A ledger with a clock that a test sets, and short ways to reserve, to add up and to die."""

from __future__ import annotations

import os
import threading
from collections import Counter

import pytest
import sqlalchemy as sql

from herd.serve.auth import Principal
from herd.serve.errors import BudgetExceeded
from herd.serve.keys import KeyPolicy, TokenBudget, create_key
from herd.serve.ledger import Ledger
from herd.serve.prices import TokenPrice
from herd.serve.store import Store
from herd.serve.tables import requests
from herd.serve.usage import read_usage

NOON = 1_795_780_800_000
"""2026-11-27 12:00 UTC in milliseconds."""
DAY_MS = 86_400_000
PRICE = TokenPrice(prompt=2_000_000, cached=500_000, completion=7_500_000)


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(store, clock):
    ledger = Ledger(store, clock=clock)
    yield ledger
    ledger.close()


def key(store: Store, name: str = "alice", **policy) -> Principal:
    info, _ = create_key(store, name, KeyPolicy(**policy), actor="test")
    return Principal(info.id, info.name, info.policy.scopes, info.cache_group)


def reserve(ledger: Ledger, principal: Principal, id_: str = "r1", prompt: int = 10, most: int = 5, **more):
    return ledger.reserve(
        principal, model="m", endpoint="/v1/chat/completions", prompt_tokens=prompt, max_completion_tokens=most,
        request_id=id_, **more,
    )  # fmt: skip


def tokens_per_day(amount: int) -> tuple[TokenBudget, ...]:
    return (TokenBudget(unit="tokens", period="day", amount=amount),)


def totals(store: Store) -> tuple[int, ...]:
    """Return billed requests, prompt, cached and completion tokens, money, and what is reserved."""
    rows = read_usage(store)
    names = (
        "requests",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "money",
        "reserved_tokens",
        "reserved_money",
    )
    return tuple(sum(getattr(row, name) for row in rows) for name in names)


def rows_of(store: Store) -> list[sql.Row]:
    with store.read() as connection:
        return list(connection.execute(sql.select(requests).order_by(requests.c.key_id, requests.c.id)))


def die(ledger: Ledger) -> None:
    """Do what the kernel does to a process that is killed: close its files."""
    counters = ledger._counters
    counters.words.release()
    counters._map.close()
    os.close(counters._descriptor)


def race(ledgers: list[Ledger], principal: Principal, count: int, name: str) -> Counter:
    """Send ``count`` requests at the same time, and return how many had which outcome."""
    outcomes: list[str] = []  # appending is atomic, counting from several threads is not
    barrier = threading.Barrier(count)

    def one(number: int) -> None:
        barrier.wait()
        try:
            reservation = reserve(ledgers[number % len(ledgers)], principal, f"{name}-{number}")
            reservation.advance(5)
            reservation.settle(5)
            outcomes.append("passed")
        except BudgetExceeded:
            outcomes.append("refused")
        except Exception as error:
            outcomes.append(repr(error))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(outcomes)
