"""Measure what HTTP, keys and the ledger cost over the bare engine: CPU time per streamed token, and TTFT.

Two processes take turns on the same load: a bare `EngineLoop` whose answers are read by asyncio, and `herd serve`'s
application with keys, budgets and a ledger, read by raw sockets in this process. The engine is a tiny random model,
greedy, and each round has new prompts, so both compute the same tokens. The CPU time of the process (all threads)
is counted, so other programs on the machine matter little. TTFT is measured with one request at a time. It is a
wall time, so the difference between the fastest tenths is given beside the difference between the medians.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from common import at_most, bench_parser, save_receipt
from contestant import Contestant
from herd.evals.bootstrap import mean_interval, ratio_interval
from herd.report import Value
from herd.serve.keys import TokenBudget
from herd.serve.prices import TokenPrice, set_price
from herd.serve.store import Store
from servers import http_request, new_key
from tiny_server import TinyServers, tiny_model

CLIENTS = 32
MAX_TOKENS = 128
SINGLE_REQUESTS = 10
PAUSE_SECONDS = 0.03
"""Pause before a single request, so that the end of the one before is over."""
BAR_US, BAR_TTFT_MS = 120, 5


def prompt(round_: int, number: int) -> str:
    """Return a prompt that no other request has."""
    return f"{round_:03} {number:03} the quick brown fox jumps over the lazy dog"


async def bare_round(loop, tokenizer, round_: int) -> dict[str, float | list[float]]:
    """Answer the load of one round, and return CPU seconds, wall seconds, tokens and TTFTs."""
    from herd.engine.request import Request, Sampling

    async def answer(number: int) -> tuple[int, float]:
        start = time.perf_counter()
        messages = [{"role": "user", "content": prompt(round_, number)}]
        ids = tokenizer.chat.render(messages, generation_prompt=True).ids
        (generation,) = loop.submit(Request(ids, Sampling(max_tokens=MAX_TOKENS)))
        first = 0.0
        async for _ in generation:
            first = first or time.perf_counter() - start
        return generation.usage.completion_tokens, first

    return await measured(answer, time.process_time)


async def measured(
    answer: Callable[[int], Awaitable[tuple[int, float]]], cpu_seconds: Callable[[], float]
) -> dict[str, float | list[float]]:
    """Ask for the answers of a round, each with its tokens and TTFT: all clients at once, and then one at a time."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    counts = [count for count, _ in await asyncio.gather(*map(answer, range(CLIENTS)))]
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    firsts = []
    for number in range(SINGLE_REQUESTS):
        await asyncio.sleep(PAUSE_SECONDS)
        firsts.append((await answer(CLIENTS + number))[1])
    return {"cpu": cpu, "wall": wall, "tokens": sum(counts), "first": firsts}


def bare_process() -> None:
    """Answer one round for each line of stdin, with a bare engine."""
    from herd.engine.engine import Engine
    from herd.engine.loop import EngineLoop

    model, tokenizer = tiny_model()
    with EngineLoop(Engine(model, tokenizer, max_batch=64)) as loop:
        for line in sys.stdin:
            print(json.dumps(asyncio.run(bare_round(loop, tokenizer, int(line)))), flush=True)


async def http_round(servers: TinyServers, token: str, round_: int) -> dict[str, float | list[float]]:
    """Send the load of one round to the server, and return the same as `bare_round`."""

    async def answer(number: int) -> tuple[int, float]:
        body = {
            "messages": [{"role": "user", "content": prompt(round_, number)}],
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = http_request("/v1/chat/completions", body, token)
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", servers.port)
        writer.write(data)
        first, usage = 0.0, b""
        while line := await reader.readline():
            if not first and b'"content":' in line and b'"role"' not in line:
                first = time.perf_counter() - start
            if b'"usage":{' in line:
                usage = line
        writer.close()
        return json.loads(usage[6:])["usage"]["completion_tokens"], first

    process = psutil.Process(servers.pid)
    return await measured(answer, lambda: sum(process.cpu_times()[:2]))


def main() -> None:
    if sys.argv[1:] == ["bare"]:
        bare_process()
        return
    parser = bench_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder, Contestant([sys.executable, __file__, "bare"]) as bare:
        store = Store(Path(folder) / "serve.db")
        set_price(store, "tiny", TokenPrice(150_000, 20_000, 600_000), "EUR", "bench")
        budgets = (TokenBudget(unit="money", period="month", amount=10**12),)
        token = new_key(store, "bench", budgets=budgets, concurrent=100, tokens_per_minute=10**9)
        servers = TinyServers(Path(folder) / "serve.db")
        servers.start()
        for round_ in range(arguments.rounds + 1):
            http_first = round_ % 2 == 0
            if http_first:
                http = asyncio.run(http_round(servers, token, round_))
            alone = bare.ask(round_)
            if not http_first:
                http = asyncio.run(http_round(servers, token, round_))
            assert http["tokens"] == alone["tokens"], (http["tokens"], alone["tokens"])
            if round_:  # the first round warms up
                pairs.append((http, alone))
        servers.stop()
        servers.close()
        store.close()
    save_receipt(
        "serve-overhead",
        what=f"HTTP, keys and ledger over the bare engine: {CLIENTS} streams, one token an event",
        values=results(pairs),
    )


def results(pairs: list[tuple[dict, dict]]) -> dict[str, Value]:
    """Return the receipt's values from (HTTP, bare) rounds."""
    extra = [1e6 * (http["cpu"] - bare["cpu"]) / http["tokens"] for http, bare in pairs]
    cost = mean_interval(extra)
    speed = ratio_interval([bare["wall"] for _, bare in pairs], [http["wall"] for http, _ in pairs])
    first = [
        1e3 * (statistics.median(http["first"]) - statistics.median(bare["first"])) for http, bare in pairs
    ]
    delay = mean_interval(first)
    quiet = [
        1e3 * statistics.quantiles([first for round_ in rounds for first in round_["first"]], n=10)[0]
        for rounds in zip(*pairs, strict=True)
    ]
    n_tokens = statistics.mean(http["tokens"] for http, _ in pairs)
    return {
        "cpu_per_token": at_most(BAR_US, cost.value, "µs", cost.lo, cost.hi),
        "ttft": at_most(BAR_TTFT_MS, delay.value, "ms", delay.lo, delay.hi),
        "ttft_fastest_tenth": Value(quiet[0] - quiet[1], "ms"),
        "bare_cpu_per_token": Value(
            statistics.mean(1e6 * bare["cpu"] / bare["tokens"] for _, bare in pairs), "µs"
        ),
        "speed_ratio": Value(speed.value, "1", speed.lo, speed.hi),
        "tokens_per_round": Value(n_tokens, "tokens"),
        "tokens_per_answer": Value(n_tokens / CLIENTS, "tokens"),
        "rounds": Value(len(pairs), "rounds"),
        "load": Value(os.getloadavg()[0], "processes"),
    }


if __name__ == "__main__":
    main()
