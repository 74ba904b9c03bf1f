"""Measure what keys and the ledger cost: CPU time for each request, and for each token of a stream.

Every step is measured alone, in one thread, in rounds: the median of the rounds counts. A transaction for each
token, which survives the same kills as the counters in shared memory, is measured beside them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import bench_parser, save_receipt
from herd.report import Value
from herd.serve.auth import Authenticator
from herd.serve.keys import KeyPolicy, TokenBudget, create_key, first_admin_key
from herd.serve.ledger import Ledger
from herd.serve.prices import TokenPrice, set_price
from herd.serve.store import Store

ROUNDS = 15


def microseconds(work: Callable[[], object], count: int) -> float:
    """Return the median CPU time of one call in µs, over rounds of ``count`` calls."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        for _ in range(count):
            work()
        times.append((time.process_time_ns() - start) / 1000 / count)
    return statistics.median(times)


def main() -> None:
    bench_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "serve.db")
        first_admin_key(store, "bench")
        set_price(store, "m", TokenPrice(150_000, 20_000, 600_000), "EUR", "bench")
        budgets = (TokenBudget(unit="money", period="month", amount=10**12),)
        policy = KeyPolicy(budgets=budgets, concurrent=1000, requests_per_minute=10**9)
        _, token = create_key(store, "bench", policy, actor="bench")
        authenticator, ledger = Authenticator(store), Ledger(store)
        header = [f"Bearer {token}"]
        principal = authenticator.authenticate(header, [])
        numbers = iter(range(10**9))

        def request() -> None:
            reservation = ledger.reserve(
                principal,
                model="m",
                endpoint="/v1/chat/completions",
                prompt_tokens=100,
                max_completion_tokens=100,
                request_id=f"r{next(numbers)}",
            )
            reservation.advance(1)
            reservation.settle(100)

        reservation = ledger.reserve(
            principal, model="m", endpoint="e", prompt_tokens=1, max_completion_tokens=1, request_id="open"
        )

        def transaction() -> None:
            with store.write() as connection:
                connection.exec_driver_sql("UPDATE requests SET completion_tokens = 1 WHERE id = 'open'")

        values = {
            "check_key": Value(microseconds(lambda: authenticator.authenticate(header, []), 100), "µs"),
            "reserve_and_settle": Value(microseconds(request, 40), "µs"),
            "advance": Value(microseconds(lambda: reservation.advance(7, 3), 20_000), "µs"),
            "revocation_check": Value(microseconds(lambda: authenticator.has_ended(principal), 20_000), "µs"),
            "transaction_per_token": Value(microseconds(transaction, 100), "µs"),
        }
        reservation.settle(0)
        ledger.close()
        authenticator.close()
        store.close()
    what = "CPU time of keys and ledger: for each request, and for each token (advance, revocation_check)"
    save_receipt("ledger-cost", what=what, values=values)


if __name__ == "__main__":
    main()
