"""Random sequences of requests on two servers that die, against a list in memory: the sums always agree."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from billing import PRICE, Clock, die, key, reserve, tokens_per_day
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from herd.serve.errors import ApiError, BudgetExceeded, RateLimited, TooManyConcurrent
from herd.serve.keys import KeyPolicy, TokenBudget
from herd.serve.ledger import Ledger
from herd.serve.prices import set_price
from herd.serve.store import Store
from herd.serve.usage import read_usage


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
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat()


def cost(prompt: int, cached: int, completion: int) -> int:
    halves = (prompt - cached) * 4 + cached + completion * 15  # PRICE in halves of a millionth
    return (halves + 1) // 2


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
