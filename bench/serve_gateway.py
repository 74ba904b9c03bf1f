"""Measure and check `herd serve --upstream` in front of scripted servers, of two Herds, and of a real vLLM.

``latency``: time to the first text, and to the end, of streams of a scripted upstream: asked directly, through Herd
with keys and a ledger, and through LiteLLM's proxy (``--no-litellm`` leaves it out), in turns. The added latency of a
request is its difference from the direct one of the same turn.

``replicas``: two gateways on one PostgreSQL. ``--rounds`` times, 100 requests at the same moment for a budget of one.
Then PostgreSQL is killed and started again under load: nothing may be lost or billed twice.

``clients`` and ``vllm``: see `real_upstreams.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from common import WORK, at_most, bench_parser, exactly, save_receipt
from herd.report import Value
from herd.serve.keys import TokenBudget
from herd.serve.store import Store
from postgres import Postgres
from real_upstreams import clients, vllm
from scripted_upstream import PROMPT_TOKENS
from servers import free_port, gateway, ledger_rows, new_key, process, scripted_upstream, wait_for

BAR_MS = 5
WARM_UP = 40
PIECES = 24
ASKED = {"model": "m", "messages": [{"role": "user", "content": "six times seven"}], "max_tokens": 64}
MASTER_KEY = "sk-bench"


async def stream_times(client: httpx.AsyncClient, url: str, token: str) -> tuple[float, float]:
    """Return the milliseconds to the first text and to the end of a stream."""
    start, first = time.perf_counter(), 0.0
    headers = {"authorization": f"Bearer {token}"}
    body = ASKED | {"stream": True}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, (url, response.status_code, await response.aread())
        async for chunk in response.aiter_raw():
            if not first and b"word" in chunk:
                first = time.perf_counter()
    return 1e3 * (first - start), 1e3 * (time.perf_counter() - start)


@contextmanager
def litellm(upstream: str, folder: Path) -> Iterator[str]:
    """Run LiteLLM's proxy before the upstream, with a key, and yield its address."""
    behind = {"model": "openai/m", "api_base": f"{upstream}/v1", "api_key": "x"}
    models = [{"model_name": "m", "litellm_params": behind}]
    config, port = folder / "litellm.yaml", free_port()
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": MASTER_KEY}}))
    program = WORK / "litellm" / "bin" / "litellm"
    words = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    with process(*words, log=folder / "litellm.log", **quiet) as child:
        wait_for(f"http://127.0.0.1:{port}/health/liveliness", child, 180)
        yield f"http://127.0.0.1:{port}"


def latency(arguments: argparse.Namespace) -> None:
    """Measure the latency that a gateway adds."""
    rows: dict[str, list[tuple[float, float]]] = {}

    async def measure(addresses: dict[str, tuple[str, str]]) -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            for turn in range(WARM_UP + arguments.requests):
                for name, (url, token) in addresses.items():
                    times = await stream_times(client, url, token)
                    if turn >= WARM_UP:
                        rows.setdefault(name, []).append(times)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        upstream = stack.enter_context(scripted_upstream(PIECES))
        store = Store(Path(folder) / "serve.db")
        budgets = (TokenBudget(unit="tokens", period="month", amount=10**12),)
        token = new_key(store, "bench", budgets=budgets, concurrent=100, tokens_per_minute=10**9)
        addresses = {"direct": (upstream, "x")}
        addresses["herd"] = (stack.enter_context(gateway(f"{folder}/serve.db", upstream)), token)
        if not arguments.no_litellm:
            addresses["litellm"] = (stack.enter_context(litellm(upstream, Path(folder))), MASTER_KEY)
        asyncio.run(measure(addresses))
        store.close()
    values: dict[str, Value] = {}
    for number, what in enumerate(("first_text", "whole_answer")):
        direct = [times[number] for times in rows["direct"]]
        values[f"direct_{what}_p50"] = Value(statistics.median(direct), "ms")
        for name in list(rows)[1:]:
            added = [times[number] - base for times, base in zip(rows[name], direct, strict=True)]
            p95 = Value(statistics.quantiles(added, n=20)[-1], "ms")
            if (name, what) == ("herd", "first_text"):
                p95 = at_most(BAR_MS, p95.value, "ms")
            values |= {
                f"{name}_{what}_added_p50": Value(statistics.median(added), "ms"),
                f"{name}_{what}_added_p95": p95,
            }
    values["requests"] = Value(arguments.requests, "requests")
    values["load"] = Value(os.getloadavg()[0], "processes")
    save_receipt(
        "serve-gateway-latency",
        what=f"Latency added before a scripted upstream that streams {PIECES} pieces, with keys, budgets and ledger",
        values=values,
    )


async def race(urls: list[str], token: str, count: int = 100) -> Counter[int]:
    """Send requests to two gateways at the same moment. Return how many had which status."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) as client:

        async def one(number: int) -> int:
            headers = {"authorization": f"Bearer {token}"}
            url = f"{urls[number % len(urls)]}/v1/chat/completions"
            return (await client.post(url, json=ASKED, headers=headers)).status_code

        return Counter(await asyncio.gather(*map(one, range(count))))


async def restart_under_load(
    urls: list[str], token: str, postgres: Postgres
) -> tuple[Counter[int], list[int]]:
    """Kill the database and start it again under load. Return statuses, and the tokens of each answer."""
    statuses: Counter[int] = Counter()
    tokens: list[int] = []
    stop = asyncio.Event()
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:

        async def work(number: int) -> None:
            while not stop.is_set():
                url = f"{urls[number % 2]}/v1/chat/completions"
                response = await client.post(url, json=ASKED, headers=headers)
                statuses[response.status_code] += 1
                if response.status_code == 200:
                    tokens.append(response.json()["usage"]["completion_tokens"])
                else:
                    assert response.headers["retry-after"], "a refusal without Retry-After"
                    await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(work(number)) for number in range(16)]
        for _ in range(2):
            await asyncio.sleep(3)
            await asyncio.to_thread(postgres.stop)
            await asyncio.sleep(1)
            await asyncio.to_thread(postgres.start)
        await asyncio.sleep(3)
        stop.set()
        await asyncio.gather(*tasks)
        await asyncio.sleep(2)
        for url in urls:  # a further request makes a server store what it could not store before
            response = await client.post(f"{url}/v1/chat/completions", json=ASKED, headers=headers)
            tokens.append(response.json()["usage"]["completion_tokens"])
    return statuses, tokens


def replicas(arguments: argparse.Namespace) -> None:
    """Check two gateways on one PostgreSQL."""
    postgres = Postgres()
    # Enough for the worst case of one request, and not for another one after it has been settled.
    used, worst = PROMPT_TOKENS + 2 * PIECES + 1, PROMPT_TOKENS + ASKED["max_tokens"]
    budgets = (TokenBudget(unit="tokens", period="day", amount=used + worst - 1),)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        stack.callback(postgres.close)
        postgres.start()
        place = postgres.database("herd")
        store = Store(place)
        upstream = stack.enter_context(scripted_upstream(PIECES))
        urls = []
        for number in range(2):
            log = Path(name) / f"gateway{number}.log"
            os.environ["XDG_DATA_HOME"] = f"{name}/machine{number}"
            urls.append(stack.enter_context(gateway(place, upstream, log=log)))
        n_exact = 0
        for round_ in range(arguments.rounds):
            statuses = asyncio.run(race(urls, new_key(store, f"race{round_}", budgets=budgets)))
            assert set(statuses) <= {200, 429}, statuses
            n_exact += statuses[200] == 1
        loaded = new_key(store, "load")
        statuses, tokens = asyncio.run(restart_under_load(urls, loaded, postgres))
        rows = ledger_rows(store, loaded)
        store.close()
    billed = Counter(row.completion_tokens for row in rows if row.prompt_tokens and row.status == "completed")
    told = Counter(tokens)
    differ = (billed - told).total() + (told - billed).total()
    others = sum(n for status, n in statuses.items() if status not in (200, 503))
    save_receipt(
        "serve-gateway-replicas",
        what="Two servers on one PostgreSQL: 100 requests at once for a budget of one; the database killed under load",
        values={
            "rounds_with_exactly_one": exactly(arguments.rounds, n_exact, "rounds"),
            "answered_under_restarts": Value(len(tokens), "requests"),
            "refused_while_away": Value(statuses[503], "requests", bar="> 0", passed=statuses[503] > 0),
            "other_failures": exactly(0, others, "requests"),
            "rows_that_differ": exactly(0, differ, "rows"),
            "still_reserved": exactly(0, sum(row.reserved_tokens for row in rows), "tokens"),
        },
    )


def main() -> None:
    parser = bench_parser(__doc__)
    rows = {each.__name__: each for each in (latency, clients, replicas, vllm)}
    parser.add_argument("row", choices=rows)
    parser.add_argument("--requests", type=int, default=300, help="of latency and vllm")
    parser.add_argument("--rounds", type=int, default=100, help="of replicas")
    parser.add_argument("--no-litellm", action="store_true", help="do not measure LiteLLM")
    parser.add_argument("--model", type=Path, help="folder of a model for vLLM")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    rows[arguments.row](arguments)


if __name__ == "__main__":
    main()
