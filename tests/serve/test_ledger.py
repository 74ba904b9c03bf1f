"""The ledger: what a request reserves, and its one bill."""

from __future__ import annotations

import pytest
from billing import PRICE, die, key, reserve, rows_of, tokens_per_day, totals

from herd.serve.auth import Principal
from herd.serve.errors import BudgetExceeded, DuplicateRequest, RateLimited, TooManyConcurrent, Unauthorized
from herd.serve.keys import revoke_key
from herd.serve.ledger import Bill, Ledger, Unmetered
from herd.serve.prices import TokenPrice, set_price


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


def test_later_steps_are_billed_but_do_not_count_as_requests(store, ledger):
    alice = key(store, requests_per_minute=2, concurrent=2, tokens_per_minute=100)
    first = reserve(ledger, alice, "a")
    steps = [reserve(ledger, alice, f"x#{step}", prompt=12, step=step) for step in (2, 3)]
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
        reserve(ledger, alice, "x#4", prompt=60, step=4)


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
