"""The limits of a key: budgets, rates, requests at once, and a clock that jumps."""

from __future__ import annotations

import pytest
from billing import DAY_MS, NOON, PRICE, key, race, reserve, tokens_per_day, totals

from herd.serve.errors import BudgetExceeded, RateLimited, TooManyConcurrent
from herd.serve.keys import TokenBudget
from herd.serve.ledger import Ledger
from herd.serve.prices import set_price
from herd.serve.usage import read_usage


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


def test_of_a_hundred_threads_one_passes_a_budget_of_one(store):
    ledgers = [Ledger(store) for _ in range(2)]
    for round_ in range(3):
        alice = key(store, f"key{round_}", budgets=tokens_per_day(29))
        assert race(ledgers, alice, 100, f"round{round_}") == {"passed": 1, "refused": 99}
    assert totals(store)[:4] == (3, 30, 0, 15)
    for ledger in ledgers:
        ledger.close()
