"""Two servers on one real PostgreSQL: budgets hold across them, neither settles the other's requests, none are lost."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sql
from billing import race, reserve

from conftest import wait_until
from herd.serve.auth import Authenticator, Principal
from herd.serve.errors import BudgetExceeded, StoreError
from herd.serve.keys import KeyPolicy, TokenBudget, create_key, revoke_key
from herd.serve.ledger import Ledger
from herd.serve.store import Store, cache_secret
from herd.serve.tables import requests, servers
from herd.serve.usage import read_usage

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from postgres import Postgres, program


@pytest.fixture(scope="module")
def postgres():
    pytest.importorskip("psycopg")
    if program("initdb") is None or program("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def place(postgres):
    """Return the URL of an empty database."""
    return postgres.database(f"t{time.time_ns()}")


@pytest.fixture
def pair(place, tmp_path, request):
    """Return two stores and ledgers on one database, as of servers on two machines.

    The parameter is the lease. A busy machine may miss a short one, and the other server then takes over.
    """
    stores = [Store(place) for _ in range(2)]
    ledgers = [
        Ledger(store, Path(tmp_path / f"machine{number}"), lease_seconds=getattr(request, "param", 0.6))
        for number, store in enumerate(stores)
    ]
    yield stores[0], ledgers
    for ledger, store in zip(ledgers, stores, strict=True):
        ledger.close()
        store.close()


def key(store: Store, name: str, **policy) -> Principal:
    info, _ = create_key(store, name, KeyPolicy(**policy), actor="test")
    return Principal(info.id, info.name, info.policy.scopes, info.cache_group)


def budget(amount: int) -> tuple[TokenBudget, ...]:
    return (TokenBudget(unit="tokens", period="day", amount=amount),)


def totals(store: Store) -> tuple[int, int, int, int]:
    rows = read_usage(store)
    names = ("requests", "prompt_tokens", "completion_tokens", "reserved_tokens")
    return tuple(sum(getattr(row, name) for row in rows) for name in names)


def test_stores_opened_at_the_same_moment_make_the_tables_once(place):
    opened: list[Store | Exception] = []

    def open_one() -> None:
        try:
            opened.append(Store(place))
        except Exception as error:
            opened.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(store, Store) for store in opened), opened
    assert len({cache_secret(store) for store in opened}) == 1
    for store in opened:
        store.close()


@pytest.mark.parametrize("pair", [60], indirect=True)
def test_of_a_hundred_requests_to_two_servers_one_passes_a_budget_of_one(pair):
    store, ledgers = pair
    for round_ in range(2):
        alice = key(store, f"key{round_}", budgets=budget(29))
        assert race(ledgers, alice, 100, f"round{round_}") == {"passed": 1, "refused": 99}
    assert totals(store) == (2, 20, 10, 0)


def test_recovery_leaves_the_requests_of_another_living_server(pair):
    store, (first, second) = pair
    alice = key(store, "alice")
    reservation = reserve(first, alice, "r1")
    reservation.advance(3)
    assert second.recover() == 0
    time.sleep(1.5)  # longer than the lease: the first server goes on sending heartbeats
    assert totals(store)[3] == 15
    reservation.settle(4)
    assert totals(store) == (1, 10, 4, 0)


def test_the_requests_of_a_machine_that_is_gone_are_released_after_its_lease(pair):
    store, (first, second) = pair
    alice = key(store, "alice", budgets=budget(15))
    reserve(first, alice, "r1").advance(3)
    first._leases._closing.set()  # as if its machine had lost its power
    with pytest.raises(BudgetExceeded):
        reserve(second, alice, "r2")
    wait_until(lambda: totals(store)[3] == 0)
    with store.read() as connection:
        assert connection.execute(sql.select(requests.c.status)).scalar_one() == "lost"
        wait_until(lambda: len(connection.execute(sql.select(servers.c.name)).all()) == 1)
    reserve(second, alice, "r2").settle(0)


def test_a_server_that_starts_again_settles_its_own_dead_ones_exactly(place, tmp_path):
    store = Store(place)
    dead = Ledger(store, tmp_path)
    reserve(dead, key(store, "alice"), "r1").advance(3, 0, 8)
    dead._leases.close(signs_off=False)
    dead._counters.words.release()
    dead._counters._map.close()
    os.close(dead._counters._descriptor)
    following = Ledger(store, tmp_path)
    assert following.recover() == 1
    assert totals(store) == (1, 8, 3, 0)
    following.close()
    with store.read() as connection:
        assert connection.execute(sql.select(servers.c.name)).all() == []
    store.close()


def test_a_key_revoked_through_one_server_ends_at_the_other(place):
    stores = [Store(place) for _ in range(2)]
    info, token = create_key(stores[0], "alice", KeyPolicy(), actor="test")
    authenticator = Authenticator(stores[1], poll_seconds=0.05)
    principal = authenticator.authenticate([f"Bearer {token}"], [])
    revoke_key(stores[0], info.id, actor="test")
    wait_until(lambda: authenticator.has_ended(principal))
    authenticator.close()
    for store in stores:
        store.close()


def test_a_store_that_restarts_under_load_loses_nothing_and_bills_nothing_twice(postgres, pair):
    store, ledgers = pair
    alice = key(store, "alice")
    stop = threading.Event()
    done: list[int] = []
    refused: list[StoreError] = []

    def work(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            try:
                reservation = reserve(ledgers[number % 2], alice, f"{number}-{count}")
            except StoreError as error:
                refused.append(error)
                time.sleep(0.02)
                continue
            reservation.advance(3)
            reservation.settle(3)
            done.append(1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(done) > 30)
    postgres.stop()
    wait_until(lambda: refused)
    postgres.start()
    before = len(done)
    wait_until(lambda: len(done) > before + 30)
    stop.set()
    for thread in threads:
        thread.join()
    assert {(error.status, error.retry_after) for error in refused} == {(503, 2.0)}
    for ledger in ledgers:
        ledger._retry()
    wait_until(lambda: totals(store)[3] == 0)
    assert totals(store)[:3] == (len(done), 10 * len(done), 3 * len(done))
