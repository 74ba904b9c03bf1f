"""The ledger: limits, budgets, one bill for each request, stores that are unavailable, and servers that die."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter

import pytest
import sqlalchemy as sql
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from herd.serve.auth import Principal
from herd.serve.counters import SLOTS, CounterFile, counters_of_dead, pack, unpack
from herd.serve.errors import (
    ApiError,
    BudgetExceeded,
    DuplicateRequest,
    RateLimited,
    StoreError,
    TooManyConcurrent,
    Unauthorized,
)
from herd.serve.keys import KeyPolicy, TokenBudget, create_key, revoke_key
from herd.serve.ledger import Bill, Ledger, Unmetered
from herd.serve.prices import TokenPrice, set_price
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


def reserve(
    ledger: Ledger, principal: Principal, id_: str = "r1", prompt: int = 10, most: int = 5, model: str = "m"
):
    return ledger.reserve(
        principal, model=model, endpoint="/v1/chat/completions", prompt_tokens=prompt, max_completion_tokens=most,
        request_id=id_,
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


def test_a_request_is_reserved_and_settled(store, ledger):
    alice = key(store)
    set_price(store, "m", PRICE, "EUR", "test")
    reservation = reserve(ledger, alice)
    assert totals(store) == (0, 0, 0, 0, 0, 15, 10 * 2 + 5 * 7.5 + 0.5)  # rounded up
    reservation.advance(1, 4)
    bill = reservation.settle(3, 4)
    assert bill == Bill(10, 4, 3, 37)  # 6 × 2 + 4 × 0.5 + 3 × 7.5 = 36.5
    assert totals(store) == (1, 10, 4, 3, 37, 0, 0)
    assert rows_of(store)[0].status == "completed"


def test_settling_twice_bills_once(store, ledger):
    reservation = reserve(ledger, key(store))
    reservation.advance(5)
    first = reservation.settle(5)
    assert reservation.settle(2, status="cancelled") == first
    assert totals(store)[:4] == (1, 10, 0, 5)
    with pytest.raises(RuntimeError, match="after it was settled"):
        reservation.advance(6)


def test_nothing_is_billed_before_the_first_byte(store, ledger):
    reservation = reserve(ledger, key(store))
    assert reservation.settle(3, status="failed") == Bill()
    assert totals(store) == (0,) * 7
    assert rows_of(store)[0].status == "failed"


@pytest.mark.parametrize("dies", [False, True])
def test_the_prompt_may_turn_out_to_be_shorter_than_reserved(store, ledger, dies):
    set_price(store, "m", PRICE, "EUR", "test")
    first = Ledger(store)
    reservation = reserve(first, key(store), prompt=100)
    reservation.advance(3, 2, 40)
    assert reservation.cost(3, 2, 40) == {"amount": "0.0001", "currency": "EUR"}
    if dies:
        die(first)
        assert ledger.recover() == 1
    else:
        assert reservation.settle(3, 2, prompt_tokens=40) == Bill(40, 2, 3, 100)  # 76 + 1 + 22.5 = 99.5
        first.close()
    assert totals(store) == (1, 40, 2, 3, 100, 0, 0)
    assert rows_of(store)[0].tokens == 43


def test_a_price_change_does_not_touch_open_requests(store, ledger):
    set_price(store, "*", PRICE, "EUR", "test")
    reservation = reserve(ledger, key(store))
    set_price(store, "*", TokenPrice(0, 0, 0), "EUR", "test")
    reservation.advance(1)
    assert reservation.settle(4).money == 10 * 2 + 4 * 7.5
    assert totals(store)[4:] == (50, 0, 0)


def test_a_worst_case_that_does_not_fit_is_refused_for_good(store, ledger, clock):
    alice = key(store, budgets=tokens_per_day(20))
    reserve(ledger, alice).advance(1)
    with pytest.raises(
        BudgetExceeded, match=r"5 tokens left, 15 tokens are reserved.*use 6 tokens.*2026-11-28 00:00"
    ) as caught:
        reserve(ledger, alice, "r2", prompt=1)
    assert (caught.value.status, caught.value.should_retry) == (429, False)
    reserve(ledger, alice, "r3", prompt=1, most=4)
    clock.now += DAY_MS
    reserve(ledger, alice, "r4", prompt=10, most=10)


def test_settling_less_frees_the_rest(store, ledger):
    alice = key(store, budgets=tokens_per_day(20))
    reservation = reserve(ledger, alice)
    reservation.advance(1)
    reservation.settle(1, status="cancelled")
    reserve(ledger, alice, "r2", prompt=4)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, alice, "r3", prompt=1, most=0)


def test_a_month_s_budget_is_the_sum_of_its_days(store, ledger, clock):
    alice = key(store, budgets=(TokenBudget(unit="tokens", period="month", amount=30),))
    for number in range(2):
        reservation = reserve(ledger, alice, f"r{number}")
        reservation.advance(5)
        reservation.settle(5)
        clock.now += DAY_MS
    with pytest.raises(BudgetExceeded, match="2026-12-01"):
        reserve(ledger, alice, "r3", prompt=1, most=0)
    clock.now = NOON + 4 * DAY_MS
    reserve(ledger, alice, "r4")


def test_a_money_budget_needs_a_price(store, ledger):
    alice = key(store, budgets=(TokenBudget(unit="money", period="day", amount=57),))
    with pytest.raises(BudgetExceeded, match="no price"):
        reserve(ledger, alice)
    set_price(store, "m", PRICE, "EUR", "test")
    with pytest.raises(BudgetExceeded, match=r"0\.000057 EUR left.*0\.000058 EUR"):
        reserve(ledger, alice)
    reserve(ledger, alice, most=4)


def test_requests_per_minute_say_when_to_return(store, ledger, clock):
    alice = key(store, requests_per_minute=2)
    for number in range(2):
        reserve(ledger, alice, f"r{number}").settle(0, status="failed")
        clock.now += 10_000
    with pytest.raises(RateLimited) as caught:
        reserve(ledger, alice, "r2")
    assert (caught.value.retry_after, caught.value.should_retry) == (40.0, True)
    clock.now += 40_000
    reserve(ledger, alice, "r2")


def test_tokens_per_minute_count_the_worst_case_and_then_the_real_number(store, ledger, clock):
    alice = key(store, tokens_per_minute=40)
    first, second = reserve(ledger, alice, "a"), reserve(ledger, alice, "b")
    with pytest.raises(RateLimited) as caught:
        reserve(ledger, alice, "c")
    assert caught.value.retry_after == 60.0
    first.advance(1)
    first.settle(1)
    second.settle(1, status="failed")  # not billed, but was computed
    clock.now += 1000
    reserve(ledger, alice, "c", prompt=13)
    with pytest.raises(RateLimited):
        reserve(ledger, alice, "d", prompt=1, most=0)
    with pytest.raises(RateLimited, match="lower max_tokens") as caught:
        reserve(ledger, alice, "e", most=100)
    assert caught.value.should_retry is False


def test_requests_at_once(store, ledger):
    alice, bob = key(store, concurrent=1), key(store, "bob", concurrent=1)
    reservation = reserve(ledger, alice)
    with pytest.raises(TooManyConcurrent) as caught:
        reserve(ledger, alice, "r2")
    assert (caught.value.status, caught.value.should_retry) == (429, True)
    reserve(ledger, bob)
    reservation.settle(0, status="cancelled")
    reserve(ledger, alice, "r2")


def test_later_steps_are_billed_but_do_not_count_as_requests(store, ledger):
    alice = key(store, requests_per_minute=2, concurrent=2, tokens_per_minute=100)
    first = reserve(ledger, alice, "a")
    steps = [
        ledger.reserve(
            alice,
            model="m",
            endpoint="/v1/chat/completions",
            prompt_tokens=12,
            max_completion_tokens=5,
            request_id=f"x#{step}",
            step=step,
        )
        for step in (2, 3)
    ]
    second = reserve(ledger, alice, "b")
    with pytest.raises(TooManyConcurrent):
        reserve(ledger, alice, "c")
    for open_request in (first, *steps, second):
        open_request.advance(1)
        open_request.settle(1)
    assert totals(store)[:4] == (2, 10 + 12 + 12 + 10, 0, 4)
    with pytest.raises(RateLimited, match="2 requests per minute"):
        reserve(ledger, alice, "c")
    with pytest.raises(RateLimited, match="100 tokens per minute"):  # a limit on tokens holds for steps too
        ledger.reserve(alice, model="m", endpoint="e", prompt_tokens=60, max_completion_tokens=5,
                       request_id="x#4", step=4)  # fmt: skip


def test_a_step_that_has_ended_reserves_only_what_it_used(store, ledger):
    set_price(store, "m", PRICE, "EUR", "test")
    alice = key(store, budgets=tokens_per_day(100))
    first = reserve(ledger, alice, "a", prompt=10, most=80)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, alice, "b", prompt=10, most=5)
    first.shrink(3)
    assert totals(store)[5] == 13
    second = reserve(ledger, alice, "b", prompt=10, most=77)
    for open_request, n_tokens in ((first, 3), (second, 7)):
        open_request.advance(n_tokens)
        open_request.settle(n_tokens)
    assert totals(store)[1:4] == (20, 0, 10)
    assert totals(store)[5:] == (0, 0)


def test_a_clock_that_jumps_locks_nobody_out_for_long(store, ledger, clock):
    alice = key(store, requests_per_minute=1, budgets=tokens_per_day(1000))
    open_one = reserve(ledger, alice)
    clock.now -= 3_600_000
    reserve(ledger, alice, "r2")
    clock.now += 40 * DAY_MS
    open_one.advance(2)
    open_one.settle(2)
    reserve(ledger, alice, "r3")
    by_day = {row.day: (row.requests, row.reserved_tokens) for row in read_usage(store)}
    assert by_day == {"2026-11-27": (1, 15), "2027-01-06": (0, 15)}


def test_a_revoked_key_reserves_nothing(store, ledger):
    alice = key(store)
    revoke_key(store, alice.key_id, "test")
    with pytest.raises(Unauthorized):
        reserve(ledger, alice)


def test_a_repeated_request_is_billed_once(store, ledger):
    alice, bob = key(store), key(store, "bob")
    first = reserve(ledger, alice)
    with pytest.raises(DuplicateRequest, match="in progress") as caught:
        reserve(ledger, alice)
    assert (caught.value.status, caught.value.should_retry) == (409, True)
    first.settle(0, status="failed")
    second = reserve(ledger, alice)  # the SDK tries again after a 500
    second.advance(5)
    second.settle(5)
    first.settle(5)
    with pytest.raises(DuplicateRequest, match="answered and billed") as caught:
        reserve(ledger, alice)
    assert caught.value.should_retry is False
    assert totals(store)[:4] == (1, 10, 0, 5)
    reserve(ledger, bob)  # another key's ids are its own


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


def away(durable: bool = False):
    raise StoreError("the store is unavailable (test)")


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


def test_without_keys_everything_is_admitted():
    reservation = Unmetered().reserve(
        Principal.local(),
        model="m",
        endpoint="e",
        prompt_tokens=10,
        max_completion_tokens=10**6,
        request_id="r",
    )
    reservation.advance(3, 2)
    assert reservation.settle(4, 2) == Bill(10, 2, 4, 0)
    Unmetered().close()


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


def test_of_a_hundred_threads_one_passes_a_budget_of_one(store):
    ledgers = [Ledger(store) for _ in range(2)]
    for round_ in range(3):
        alice = key(store, f"key{round_}", budgets=tokens_per_day(29))
        assert race(ledgers, alice, 100, f"round{round_}") == {"passed": 1, "refused": 99}
    assert totals(store)[:4] == (3, 30, 0, 15)
    for ledger in ledgers:
        ledger.close()


class LedgerMachine(RuleBasedStateMachine):
    """Compare two servers on one store with a list of requests in memory, also when servers die."""

    POLICIES = (
        {},
        {"budgets": tokens_per_day(60), "concurrent": 3},
        {"budgets": (TokenBudget(unit="money", period="month", amount=400),), "requests_per_minute": 4},
        {"tokens_per_minute": 50},
    )

    def __init__(self) -> None:
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.store = Store(Path(self.folder.name) / "serve.db")
        set_price(self.store, "m", PRICE, "EUR", "test")
        self.clock = Clock()
        self.ledgers = [Ledger(self.store, clock=self.clock) for _ in range(2)]
        self.keys = [key(self.store, f"key{n}", **policy) for n, policy in enumerate(self.POLICIES)]
        self.requests: list[dict] = []
        self.counter = 0

    def teardown(self) -> None:
        for ledger in self.ledgers:
            ledger.close()
        self.store.close()
        self.folder.cleanup()

    def expected(self, number: int, prompt: int, most: int) -> type[ApiError] | None:
        policy, now = KeyPolicy(**self.POLICIES[number]), self.clock.now
        mine = [request for request in self.requests if request["key"] == number]
        if policy.concurrent is not None and sum(r["open"] for r in mine) >= policy.concurrent:
            return TooManyConcurrent
        recent = [r for r in mine if now - 60_000 < r["at"] <= now + 60_000]
        if policy.requests_per_minute is not None and len(recent) >= policy.requests_per_minute:
            return RateLimited
        counted = sum(r["counted"] for r in recent) + prompt + most
        if policy.tokens_per_minute is not None and counted > policy.tokens_per_minute:
            return RateLimited
        for budget in policy.budgets:
            length = 10 if budget.period == "day" else 7
            same = [r for r in mine if iso(r["at"])[:length] == iso(now)[:length]]
            name, worst = (
                ("tokens", prompt + most) if budget.unit == "tokens" else ("money", cost(prompt, 0, most))
            )
            if sum(r[name] for r in same) + worst > budget.amount:
                return BudgetExceeded
        return None

    @rule(
        server=st.integers(0, 1), number=st.integers(0, 3), prompt=st.integers(1, 30), most=st.integers(0, 30)
    )
    def reserve(self, server, number, prompt, most):
        expected = self.expected(number, prompt, most)
        self.counter += 1
        words = (self.ledgers[server], self.keys[number], f"r{self.counter}", prompt, most)
        if expected is not None:
            with pytest.raises(expected):
                reserve(*words)
            return
        reservation = reserve(*words)
        self.requests.append(
            {
                "key": number, "at": self.clock.now, "open": True, "server": server, "reservation": reservation,
                "prompt": prompt, "most": most, "counted": prompt + most, "tokens": prompt + most,
                "money": cost(prompt, 0, most), "begun": False, "completion": 0, "cached": 0, "billed": 0,
                "corrected": 0,
            }
        )  # fmt: skip

    def open_one(self, data) -> dict:
        return data.draw(st.sampled_from([request for request in self.requests if request["open"]]))

    @precondition(lambda self: any(request["open"] for request in self.requests))
    @rule(data=st.data())
    def advance(self, data):
        request = self.open_one(data)
        request["begun"] = True
        request["completion"] = data.draw(st.integers(request["completion"], request["most"]))
        request["cached"] = data.draw(st.integers(request["cached"], request["prompt"]))
        request["corrected"] = data.draw(st.sampled_from([0, request["prompt"] + 1]))
        request["reservation"].advance(request["completion"], request["cached"], request["corrected"])

    @precondition(lambda self: any(request["open"] for request in self.requests))
    @rule(data=st.data())
    def settle(self, data):
        request = self.open_one(data)
        request["completion"] = data.draw(st.integers(request["completion"], request["most"]))
        status = data.draw(st.sampled_from(["completed", "cancelled", "failed"]))
        request["reservation"].settle(request["completion"], request["cached"], status, request["corrected"])
        self.closed(request)

    @precondition(lambda self: any(not request["open"] for request in self.requests))
    @rule(data=st.data())
    def settle_again(self, data):
        request = data.draw(st.sampled_from([request for request in self.requests if not request["open"]]))
        if request["reservation"] is not None:
            request["reservation"].settle(request["most"], 0, "failed")

    def closed(self, request: dict) -> None:
        request["open"] = False
        request["prompt"] = request["corrected"] or request["prompt"]
        request["counted"] = request["prompt"] + request["completion"]
        request["billed"] = int(request["begun"])
        request["tokens"] = request["billed"] * request["counted"]
        request["money"] = request["billed"] * cost(
            request["prompt"], request["cached"], request["completion"]
        )

    @rule(server=st.integers(0, 1))
    def kill_and_restart(self, server):
        die(self.ledgers[server])
        self.ledgers[server] = Ledger(self.store, clock=self.clock)
        lost = [request for request in self.requests if request["open"] and request["server"] == server]
        assert self.ledgers[server].recover() == len(lost)
        for request in lost:
            if not request["begun"]:
                request["completion"] = 0
            self.closed(request)
            request["reservation"] = None

    @rule(seconds=st.sampled_from([1, 20, 61, 3600, 86_400, 40 * 86_400, -30]))
    def wait(self, seconds):
        self.clock.now += 1000 * seconds

    @invariant()
    def sums_agree(self):
        usage = read_usage(self.store)
        for number, principal in enumerate(self.keys):
            rows = [row for row in usage if row.key_id == principal.key_id]
            mine = [request for request in self.requests if request["key"] == number]
            assert sum(row.requests for row in rows) == sum(r["billed"] for r in mine)
            billed = [r for r in mine if r["billed"]]
            assert sum(row.prompt_tokens for row in rows) == sum(r["prompt"] for r in billed)
            assert sum(row.cached_tokens for row in rows) == sum(r["cached"] for r in billed)
            assert sum(row.completion_tokens for row in rows) == sum(r["completion"] for r in billed)
            assert sum(row.money for row in rows) == sum(r["money"] for r in billed)
            still = [r for r in mine if r["open"]]
            assert sum(row.reserved_tokens for row in rows) == sum(r["tokens"] for r in still)
            assert sum(row.reserved_money for row in rows) == sum(r["money"] for r in still)


def iso(at_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat()


def cost(prompt: int, cached: int, completion: int) -> int:
    halves = (prompt - cached) * 4 + cached + completion * 15  # PRICE in halves of a millionth
    return (halves + 1) // 2


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


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


def test_the_store_s_file_is_sound_after_all_this(store, ledger):
    reserve(ledger, key(store)).settle(0)
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
