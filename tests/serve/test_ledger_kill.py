"""The ledger with real processes: `kill -9` at random moments, and many processes that race for one budget."""

import multiprocessing
import os
import random
import select
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from billing import race, rows_of, totals

from herd.serve.auth import Principal
from herd.serve.keys import KeyPolicy, TokenBudget, create_key
from herd.serve.ledger import Ledger
from herd.serve.prices import TokenPrice, set_price
from herd.serve.store import Store
from herd.serve.usage import read_usage

MAX_CHUNK = 5
PROMPT, CACHED, COMPLETION = 7, 3, 40
FORK = multiprocessing.get_context("fork")


def serve(path: Path, principal: Principal, client: int, seed: int) -> None:
    """Be a server: answer one request after the other, in chunks, to a client at the other end of a pipe."""
    draw = random.Random(seed)
    ledger = Ledger(Store(path))
    ledger.recover()
    for number in range(10_000):
        name = f"{seed}-{number}"
        reservation = ledger.reserve(
            principal, model="m", endpoint="/v1/messages", prompt_tokens=PROMPT, max_completion_tokens=COMPLETION,
            request_id=name,
        )  # fmt: skip
        sent = 0
        while sent < COMPLETION:
            sent = min(sent + draw.randint(1, MAX_CHUNK), COMPLETION)
            reservation.advance(sent, CACHED)
            os.write(client, f"{name} {sent}\n".encode())
        reservation.settle(sent, CACHED)
        os.write(client, f"{name} done\n".encode())


def kill_at_random_moments(path: Path, kills: int, seed: int) -> tuple[dict[str, int], set[str]]:
    """Start and kill servers. Return the tokens that clients received, and the requests they saw end."""
    draw = random.Random(seed)
    store = Store(path)
    set_price(store, "m", TokenPrice(2_000_000, 1_000_000, 3_000_000), "EUR", "test")
    info, _ = create_key(store, "alice", KeyPolicy(), actor="test")
    store.close()
    principal = Principal(info.id, info.name, info.policy.scopes, info.cache_group)
    received: dict[str, int] = defaultdict(int)
    done: set[str] = set()
    for number in range(kills):
        reading, writing = os.pipe()
        process = FORK.Process(target=serve, args=(path, principal, writing, number))
        process.start()
        os.close(writing)
        assert select.select([reading], [], [], 60)[0]
        time.sleep(draw.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with os.fdopen(reading) as lines:
            for line in lines:
                name, word = line.split()
                if word == "done":
                    done.add(name)
                else:
                    received[name] = int(word)
    return received, done


def check_kills(path: Path, kills: int, seed: int) -> Counter[str]:
    """Kill servers, and compare the ledger with what clients received. Return the number of each status."""
    received, done = kill_at_random_moments(path, kills, seed)
    store = Store(path)
    ledger = Ledger(store)
    ledger.recover()
    rows = {row.id: row for row in rows_of(store)}
    assert received.keys() <= rows.keys()
    for name, row in rows.items():
        assert row.status in ("completed", "crashed")
        got = received.get(name, 0)
        assert got <= row.completion_tokens <= got + MAX_CHUNK, name
        if row.completion_tokens:
            assert (row.prompt_tokens, row.cached_tokens) == (PROMPT, CACHED)
            assert row.money == 4 * 2 + 3 * 1 + 3 * row.completion_tokens
        else:
            assert (row.prompt_tokens, row.cached_tokens, row.money) == (0, 0, 0)
    assert {rows[name].status for name in done} <= {"completed"}
    billed = [row for row in rows.values() if row.completion_tokens]
    sums = [
        sum(getattr(row, name) for row in billed) for name in ("prompt_tokens", "completion_tokens", "money")
    ]
    (usage,) = read_usage(store)
    assert [usage.prompt_tokens, usage.completion_tokens, usage.money] == sums
    assert (usage.requests, usage.reserved_tokens, usage.reserved_money) == (len(billed), 0, 0)
    assert list(ledger._folder.iterdir()) == [ledger._counters.path]
    ledger.close()
    store.close()
    return Counter(row.status for row in rows.values())


def test_after_kill_9_the_bill_is_what_was_received_or_one_chunk_more(tmp_path):
    statuses = check_kills(tmp_path / "serve.db", kills=8, seed=1)
    assert statuses["crashed"] + statuses["completed"] >= 8


@pytest.mark.soak
def test_two_hundred_kills(tmp_path):
    statuses = check_kills(tmp_path / "serve.db", kills=200, seed=2)
    assert statuses["crashed"] > 50


def compete(path: Path, keys: list[Principal], start, outcomes) -> None:
    """Send 25 requests at the same time for each key, together with other processes."""
    store = Store(path)
    ledgers = [Ledger(store)]
    for number, principal in enumerate(keys):
        start.wait()
        outcomes.put((number, dict(race(ledgers, principal, 25, f"{os.getpid()}-{number}"))))
    ledgers[0].close()
    store.close()


def race_of_processes(path: Path, rounds: int) -> None:
    """Let four processes with 25 threads each race for the only place in a budget, ``rounds`` times."""
    store = Store(path)
    policy = KeyPolicy(budgets=(TokenBudget(unit="tokens", period="day", amount=29),))
    infos = [create_key(store, f"key{number}", policy, actor="test")[0] for number in range(rounds)]
    store.close()
    principals = [Principal(info.id, info.name, info.policy.scopes, info.cache_group) for info in infos]
    start, outcomes = FORK.Barrier(4), FORK.Queue()
    processes = [FORK.Process(target=compete, args=(path, principals, start, outcomes)) for _ in range(4)]
    for process in processes:
        process.start()
    counts = [Counter() for _ in range(rounds)]
    for _ in range(4 * rounds):
        number, outcome = outcomes.get(timeout=120)
        counts[number].update(outcome)
    for process in processes:
        process.join()
    assert counts == [{"passed": 1, "refused": 99}] * rounds
    store = Store(path)
    assert totals(store)[:4] == (rounds, 10 * rounds, 0, 5 * rounds)
    store.close()


def test_of_a_hundred_requests_in_four_processes_one_passes_a_budget_of_one(tmp_path):
    race_of_processes(tmp_path / "serve.db", 2)


@pytest.mark.soak
def test_exactly_one_passes_a_hundred_times(tmp_path):
    race_of_processes(tmp_path / "serve.db", 100)
