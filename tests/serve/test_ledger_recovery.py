"""The ledger when its store is away or full, and after servers died: counters, recovery, no bill lost."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sql
from billing import die, key, reserve, rows_of, totals

from herd.serve.counters import SLOTS, CounterFile, counters_of_dead, pack, unpack
from herd.serve.errors import ApiError, StoreError
from herd.serve.ledger import Ledger


def away(durable: bool = False):
    raise StoreError("the store is unavailable (test)")


def test_a_store_that_is_unavailable_refuses_new_requests_and_settles_open_ones_later(
    store, ledger, monkeypatch
):
    alice = key(store, concurrent=2)
    reservation = reserve(ledger, alice)
    reservation.advance(2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", away)
        assert reservation.settle(3).completion_tokens == 3
        with pytest.raises(StoreError) as caught:
            reserve(ledger, alice, "r2")
        assert (caught.value.status, caught.value.should_retry) == (503, True)
    assert totals(store)[:2] == (0, 0)
    reserve(ledger, alice, "r3")
    assert totals(store) == (1, 10, 0, 3, 0, 15, 0)


def test_a_server_that_ends_while_the_store_is_away_loses_no_bill(store, monkeypatch):
    ledger = Ledger(store)
    reservation = reserve(ledger, key(store))
    reservation.advance(2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", away)
        reservation.settle(3)
        ledger.close()
    following = Ledger(store)
    assert following.recover() == 1
    assert totals(store)[:4] == (1, 10, 0, 3)
    following.close()


def test_the_ledger_of_a_store_on_a_full_disk_refuses_and_keeps_its_sums(store, ledger):
    alice = key(store)
    with store.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    @sql.event.listens_for(store._engine, "begin")
    def limit(connection):
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    admitted = []

    def fill() -> None:
        for number in range(1000):
            admitted.append(reserve(ledger, alice, f"request-{number:0100}"))

    with pytest.raises(StoreError, match="full"):
        fill()
    assert totals(store)[5] == 15 * len(admitted)
    for reservation in admitted:
        reservation.advance(1)
        reservation.settle(1)
    sql.event.remove(store._engine, "begin", limit)
    store.close()  # new connections have no limit
    reserve(ledger, alice, "after")
    assert totals(store) == (len(admitted), 10 * len(admitted), 0, len(admitted), 0, 15, 0)
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_recovery_settles_dead_servers_only(store):
    alice = key(store)
    dead, living, following = Ledger(store), Ledger(store), None
    for number, counter in enumerate((None, 0, 3)):
        reservation = reserve(dead, alice, f"dead{number}")
        if counter is not None:
            reservation.advance(counter, 2)
    reserve(living, alice, "living").advance(1)
    die(dead)
    following = Ledger(store)
    assert following.recover() == 3
    assert following.recover() == 0
    assert {
        row.id: (row.status, row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        for row in rows_of(store)
    } == {
        "dead0": ("crashed", 0, 0, 0),
        "dead1": ("crashed", 10, 2, 0),
        "dead2": ("crashed", 10, 2, 3),
        "living": ("open", 10, 0, 0),
    }
    assert totals(store) == (2, 20, 4, 3, 0, 15, 0)
    following.close()
    die(living)


def test_requests_whose_counters_are_gone_are_released_and_not_billed(store):
    ledger = Ledger(store)
    reserve(ledger, key(store)).advance(3)
    die(ledger)
    ledger._counters.path.unlink()
    following = Ledger(store)
    assert following.recover() == 1
    assert rows_of(store)[0].status == "lost"
    assert totals(store) == (0,) * 7
    following.close()


def test_a_clean_end_leaves_no_counter_file(store):
    ledger = Ledger(store)
    reserve(ledger, key(store)).settle(0)
    path = ledger._counters.path
    assert path.exists()
    ledger.close()
    assert not path.exists()


def test_the_disk_space_of_counters_is_taken_at_the_start(tmp_path):
    counters = CounterFile(tmp_path / "a.counters")
    assert (tmp_path / "a.counters").stat().st_blocks * 512 >= 2 * SLOTS * 8
    with counters_of_dead(tmp_path / "a.counters") as words:
        assert words is None
    counters.close()
    with counters_of_dead(tmp_path / "a.counters") as words:
        assert words is None


def test_more_open_requests_than_counters_are_refused(tmp_path):
    counters = CounterFile(tmp_path / "a.counters")
    taken = [counters.take() for _ in range(SLOTS)]
    assert len(set(taken)) == SLOTS
    with pytest.raises(ApiError) as caught:
        counters.take()
    assert caught.value.status == 503
    counters.words[7] = pack(3, 4)
    counters.give_back(7)
    assert counters.take() == 7
    assert unpack(counters.words[7]) == (False, 0, 0)
    assert not counters.close()


@pytest.mark.parametrize("completion, cached", [(0, 0), (1, 2), (2**31 - 1, 2**31 - 1)])
def test_counters_are_packed_without_loss(completion, cached):
    assert unpack(pack(completion, cached)) == (True, completion, cached)
    assert pack(completion, cached) < 2**64
