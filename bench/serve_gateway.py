"""Measure and check `herd serve --upstream` before scripted servers, before two Herds, and before a real vLLM.

``latency``: time to the first text, and to the end, of streams of a scripted upstream: asked directly, through Herd
with keys and a ledger, and through LiteLLM's proxy (``--no-litellm`` leaves it out), in turns. The added latency of a
request is its difference from the direct one of the same turn.

``clients``: the SDKs of OpenAI, Anthropic and Ollama through a gateway before two Herds with the same tiny model. Their
answers must be those of one of the Herds, and the ledger the sum of what they were told. Then one of the two is killed
while ``STREAMS`` answers are under way: each must end whole, or with an error event, and be billed exactly.

``replicas``: two gateways on one PostgreSQL. ``--rounds`` times, 100 requests at the same moment for a budget of one.
Then PostgreSQL is killed and started again under load: nothing may be lost or billed twice.

``vllm``: a real vLLM on the CPU (``--python`` of its environment) with a model folder (``--model``): chats, completions
and messages by 8 clients, one in ten hangs up, the ledger against what clients were told, vLLM killed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from common import WORK, bench_parser, save_receipt
from herd.report import Value
from herd.serve.keys import KeyPolicy, TokenBudget, create_key
from herd.serve.store import Store
from herd.serve.tables import requests
from herd.serve.usage import read_usage
from postgres import Postgres
from scripted_upstream import PROMPT_TOKENS

BAR_MS = 5
WARM_UP = 40
PIECES = 24
STREAMS = 24
UPSTREAM_KEY = "HERD_UPSTREAM_KEY"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "six times seven"}], "max_tokens": 64}
TELLS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                           "additionalProperties": False},
        },
    }
]  # fmt: skip


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def process(*words: str, log: Path | None = None, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a process group of its own, and end the group."""
    out = subprocess.DEVNULL if log is None else log.open("wb")
    child = subprocess.Popen(
        words, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def wait_for(url: str, child: subprocess.Popen[bytes], seconds: float = 60, **headers: str) -> None:
    """Wait until an address answers with 200."""
    end = time.monotonic() + seconds
    while True:
        assert child.poll() is None, f"the server for {url} ended at its start"
        assert time.monotonic() < end, f"{url} does not answer"
        with suppress(httpx.HTTPError):
            if httpx.get(url, headers=headers).status_code == 200:
                return
        time.sleep(0.1)


@contextmanager
def gateway(store: str, *upstreams: str, key: str = "none", log: Path | None = None) -> Iterator[str]:
    """Run `herd serve` before other servers and yield its address."""
    port = free_port()
    words = [sys.executable, "-m", "herd", "serve", "--port", str(port), "--store", store, "--keys"]
    for upstream in upstreams:
        words += ["--upstream", upstream]
    with process(*words, log=log, **{UPSTREAM_KEY: key}) as child:
        wait_for(f"http://127.0.0.1:{port}/readyz", child)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def scripted_upstream() -> Iterator[str]:
    """Run a scripted server in a process of its own and yield its address."""
    port = free_port()
    script = Path(__file__).with_name("scripted_upstream.py")
    with process(sys.executable, str(script), str(port), str(PIECES)) as child:
        wait_for(f"http://127.0.0.1:{port}/v1/models", child)
        yield f"http://127.0.0.1:{port}"


def new_key(store: Store, name: str, **policy: Any) -> str:
    """Create a key and return its token."""
    return create_key(store, name, KeyPolicy(**policy), actor="bench")[1]


def n_different(some: list[int], others: list[int]) -> int:
    """Return how many numbers of two lists have no partner in the other one, in any order."""
    first, second = Counter(some), Counter(others)
    return (first - second).total() + (second - first).total()


# latency


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
    config = {
        "model_list": [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/m", "api_base": f"{upstream}/v1", "api_key": "x"},
            }
        ],
        "general_settings": {"master_key": "sk-bench"},
    }
    (folder / "litellm.yaml").write_text(json.dumps(config))
    port = free_port()
    program = WORK / "litellm" / "bin" / "litellm"
    words = [
        str(program),
        "--config",
        str(folder / "litellm.yaml"),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
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
        upstream = stack.enter_context(scripted_upstream())
        store = Store(Path(folder) / "serve.db")
        budgets = (TokenBudget(unit="tokens", period="month", amount=10**12),)
        token = new_key(store, "bench", budgets=budgets, concurrent=100, tokens_per_minute=10**9)
        addresses = {"direct": (upstream, "x")}
        addresses["herd"] = (stack.enter_context(gateway(f"{folder}/serve.db", upstream)), token)
        if not arguments.no_litellm:
            addresses["litellm"] = (stack.enter_context(litellm(upstream, Path(folder))), "sk-bench")
        asyncio.run(measure(addresses))
        store.close()
    values: dict[str, Value] = {}
    for number, what in enumerate(("first_text", "whole_answer")):
        direct = [times[number] for times in rows["direct"]]
        values[f"direct_{what}_p50"] = Value(statistics.median(direct), "ms")
        for name in list(rows)[1:]:
            added = sorted(times[number] - base for times, base in zip(rows[name], direct, strict=True))
            p95 = statistics.quantiles(added, n=20)[-1]
            values[f"{name}_{what}_added_p50"] = Value(statistics.median(added), "ms")
            has_bar = (name, what) == ("herd", "first_text")
            values[f"{name}_{what}_added_p95"] = (
                Value(p95, "ms", bar=f"≤ {BAR_MS}", passed=p95 <= BAR_MS) if has_bar else Value(p95, "ms")
            )
    values["requests"] = Value(arguments.requests, "requests")
    values["load"] = Value(os.getloadavg()[0], "processes")
    save_receipt(
        "serve-gateway-latency",
        commit=arguments.commit,
        what=f"Latency added before a scripted upstream that streams {PIECES} pieces, with keys, budgets and ledger",
        values=values,
    )


# clients


def sdk_answers(url: str, key: str) -> tuple[list[Any], list[int]]:
    """Return what the SDKs get from a server, and the completion tokens of each request as they were told."""
    import anthropic
    import ollama
    import openai

    answers: list[Any] = []
    told: list[int] = []
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "the quick fox"}], "temperature": 0}
    for more in (
        {"max_tokens": 12},
        {"max_tokens": 9, "n": 2, "logprobs": True, "top_logprobs": 2},
        {"max_tokens": 200, "tools": TOOLS, "tool_choice": "required"},
        {"max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "strict": True, "schema": TOOLS[0]["function"]["parameters"]}}},
    ):  # fmt: skip
        whole = client.chat.completions.create(**asked, **more)
        told.append(whole.usage.completion_tokens)
        answers.append([(c.message.content, c.finish_reason) for c in whole.choices])
        answers.append([t.function.arguments for t in whole.choices[0].message.tool_calls or ()])
        text: Counter[int] = Counter()
        parts: dict[int, str] = {}
        for chunk in client.chat.completions.create(**asked, **more, **TELLS):
            for choice in chunk.choices:
                parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
            text["tokens"] = chunk.usage.completion_tokens
        told.append(text["tokens"])
        assert [parts[c.index] for c in whole.choices] == [c.message.content or "" for c in whole.choices]
        assert text["tokens"] == whole.usage.completion_tokens
    completion = client.completions.create(
        model="tiny", prompt=["the", "over"], max_tokens=6, echo=True, temperature=0
    )
    told.append(completion.usage.completion_tokens)
    answers.append([choice.text for choice in completion.choices])
    response = client.responses.create(
        model="tiny", input="the lazy dog", max_output_tokens=10, temperature=0
    )
    told.append(response.usage.output_tokens)
    answers.append(response.output_text)
    claude = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
    messages = [{"role": "user", "content": "the brown fox"}]
    extra = {"temperature": 0}
    message = claude.messages.create(model="tiny", max_tokens=11, messages=messages, extra_body=extra)
    told.append(message.usage.output_tokens)
    answers.append((message.content[0].text, message.stop_reason))
    with claude.messages.stream(model="tiny", max_tokens=11, messages=messages, extra_body=extra) as stream:
        final = stream.get_final_message()
    told.append(final.usage.output_tokens)
    answers.append((final.content[0].text, final.stop_reason))
    answers.append(claude.messages.count_tokens(model="tiny", messages=messages).input_tokens)
    local = ollama.Client(url, headers={"authorization": f"Bearer {key}"})
    chat = local.chat(
        "tiny", [{"role": "user", "content": "the fox"}], options={"num_predict": 7, "temperature": 0}
    )
    raw = local.generate("tiny", "the fox", raw=True, options={"num_predict": 7, "temperature": 0})
    told += [chat.eval_count, raw.eval_count]
    answers += [chat.message.content, raw.response]
    return answers, told


async def watched_stream(
    client: httpx.AsyncClient, url: str, token: str, number: int, begun: set[int] | None = None
) -> tuple[str, int]:
    """Return how a stream ended (whole, error, cut) and the tokens that its last chunk told.

    Its number is added to ``begun`` when it has some text.
    """
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"{number} jumps"}],
        "max_tokens": 800,
    } | TELLS
    headers = {"authorization": f"Bearer {token}"}
    tokens, end = 0, "cut"
    with suppress(httpx.HTTPError):
        async with client.stream(
            "POST", f"{url}/v1/chat/completions", json=body, headers=headers
        ) as response:
            if response.status_code != 200:
                return f"refused {response.status_code}", 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    end = "whole"
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        end = "error"
                    else:
                        tokens = max(tokens, (event.get("usage") or {}).get("completion_tokens", 0))
                        if tokens and begun is not None:
                            begun.add(number)
    return end, tokens


def clients(arguments: argparse.Namespace) -> None:
    """Check the SDKs before two Herds, and the end of one of them."""
    from tiny_server import TinyServers

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        behind, store = Store(folder / "behind.db"), Store(folder / "serve.db")
        upstream_key = new_key(behind, "gateway")
        herds = [TinyServers(folder / "behind.db", max_batch=16) for _ in range(2)]
        for herd in herds:
            herd.start()
            stack.callback(herd.close)
            stack.callback(lambda herd=herd: herd.pid and herd.stop())
        urls = [f"http://127.0.0.1:{herd.port}" for herd in herds]
        url = stack.enter_context(gateway(f"{folder}/serve.db", *urls, key=upstream_key))
        token = new_key(store, "sdk")
        direct, _ = sdk_answers(urls[0], upstream_key)
        through, told = sdk_answers(url, token)
        equal = sum(one == other for one, other in zip(direct, through, strict=True))
        billed = sum(row.completion_tokens for row in read_usage(store))
        streaming = new_key(store, "streams")

        async def kill_one() -> list[tuple[str, int]]:
            async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
                begun: set[int] = set()
                tasks = [
                    asyncio.create_task(watched_stream(client, url, streaming, number, begun))
                    for number in range(STREAMS)
                ]
                while len(begun) < STREAMS * 3 // 4:
                    await asyncio.sleep(0.01)
                os.kill(herds[1].pid, signal.SIGKILL)
                return await asyncio.gather(*tasks)

        ends = asyncio.run(kill_one())
        herds[1].pid = 0
        after = [asyncio.run(_one_stream(url, streaming, number)) for number in range(6)]
        time.sleep(1)
        kept = _rows(store, streaming)
        seen = sorted(tokens for end, tokens in [*ends, *after])
        differ = n_different(seen, [row.completion_tokens for row in kept])
        reserved = sum(row.reserved_tokens for row in kept)
    counts = Counter(end for end, _ in ends)
    whole = counts["whole"] + counts["error"] == STREAMS and counts["error"] > 0
    values = {
        "sdk_answers_equal": Value(equal, "answers", bar=f"= {len(direct)}", passed=equal == len(direct)),
        "sdk_tokens_billed": Value(billed, "tokens", bar=f"= {sum(told)}", passed=billed == sum(told)),
        "streams_ended_well": Value(
            counts["whole"] + counts["error"], "streams", bar=f"= {STREAMS}, some by an error", passed=whole
        ),
        "streams_ended_by_error": Value(counts["error"], "streams"),
        "later_streams_whole": Value(
            sum(end == "whole" for end, _ in after),
            "streams",
            bar="= 6",
            passed=all(e == "whole" for e, _ in after),
        ),
        "rows_that_differ": Value(differ, "rows", bar="= 0", passed=differ == 0),
        "still_reserved": Value(reserved, "tokens", bar="= 0", passed=reserved == 0),
        "tokens_of_streams": Value(sum(seen), "tokens"),
    }
    save_receipt(
        "serve-gateway-clients",
        commit=arguments.commit,
        what="The SDKs through a gateway before two Herds, one of which is killed under load",
        values=values,
    )


async def _one_stream(url: str, token: str, number: int) -> tuple[str, int]:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        return await watched_stream(client, url, token, 100 + number)


def _rows(store: Store, token: str) -> list[Any]:
    """Return the ledger's rows of a key."""
    import sqlalchemy as sql

    with store.read() as connection:
        return list(connection.execute(sql.select(requests).where(requests.c.key_id == token.split("-")[1])))


# replicas


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
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        stack.callback(postgres.close)
        postgres.start()
        place = postgres.database("herd")
        store = Store(place)
        upstream = stack.enter_context(scripted_upstream())
        urls = []
        for number in range(2):
            log = Path(name) / f"gateway{number}.log"
            os.environ["XDG_DATA_HOME"] = f"{name}/machine{number}"
            urls.append(stack.enter_context(gateway(place, upstream, log=log)))
        passed = []
        for round_ in range(arguments.rounds):
            # Enough for the worst case of one request, and not for another one after it has been settled.
            used, worst = PROMPT_TOKENS + 2 * PIECES + 1, PROMPT_TOKENS + ASKED["max_tokens"]
            budget = (TokenBudget(unit="tokens", period="day", amount=used + worst - 1),)
            statuses = asyncio.run(race(urls, new_key(store, f"race{round_}", budgets=budget)))
            assert set(statuses) <= {200, 429}, statuses
            passed.append(statuses[200])
        loaded = new_key(store, "load")
        statuses, tokens = asyncio.run(restart_under_load(urls, loaded, postgres))
        kept = _rows(store, loaded)
        billed = sorted(
            row.completion_tokens for row in kept if row.prompt_tokens and row.status == "completed"
        )
        left = sum(row.reserved_tokens for row in kept)
        store.close()
    n_exact = sum(each == 1 for each in passed)
    differ = n_different(billed, tokens)
    save_receipt(
        "serve-gateway-replicas",
        commit=arguments.commit,
        what="Two servers on one PostgreSQL: 100 requests at once for a budget of one; the database killed under load",
        values={
            "rounds_with_exactly_one": Value(
                n_exact, "rounds", bar=f"= {arguments.rounds}", passed=n_exact == arguments.rounds
            ),
            "answered_under_restarts": Value(len(tokens), "requests"),
            "refused_while_away": Value(statuses[503], "requests", bar="> 0", passed=statuses[503] > 0),
            "other_failures": Value(
                sum(n for status, n in statuses.items() if status not in (200, 503)), "requests", bar="= 0",
                passed=set(statuses) <= {200, 503},
            ),
            "rows_that_differ": Value(differ, "rows", bar="= 0", passed=differ == 0),
            "still_reserved": Value(left, "tokens", bar="= 0", passed=left == 0),
        },
    )  # fmt: skip


# vllm


def vllm(arguments: argparse.Namespace) -> None:
    """Check a gateway before a real vLLM."""
    port = free_port()
    words = [
        str(Path(arguments.python).parent / "vllm"),
        "serve",
        str(arguments.model),
        "--dtype",
        "bfloat16",
    ]
    words += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "1024",
        "--enforce-eager",
    ]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        log = WORK / "vllm.log"
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "2"}
        child = stack.enter_context(process(*words, log=log, **settings))
        wait_for(f"http://127.0.0.1:{port}/health", child, 600)
        store = Store(Path(name) / "serve.db")
        url = stack.enter_context(gateway(f"{name}/serve.db", f"http://127.0.0.1:{port}"))
        token = new_key(store, "load")
        ends = asyncio.run(_mixed_load(url, token, arguments.requests))
        killed = asyncio.run(_killed(url, new_key(store, "killed"), child))
        time.sleep(2)
        kept = _rows(store, token)
        whole = sorted(tokens for end, tokens in ends if end == "whole")
        billed = sorted(row.completion_tokens for row in kept if row.status == "completed")
        left_rows = [row for row in kept if row.status == "cancelled"]
        store.close()
    n_left = sum(end == "left" for end, _ in ends)
    differ = n_different(billed, whole)
    failed = sum(end not in ("whole", "left") for end, _ in ends)
    save_receipt(
        "serve-gateway-vllm",
        commit=arguments.commit,
        what="A gateway before a real vLLM on the CPU: mixed load, clients that hang up, and a kill",
        values={
            "whole": Value(len(whole), "requests"),
            "hung_up": Value(n_left, "requests"),
            "failed": Value(failed, "requests", bar="= 0", passed=failed == 0),
            "rows_that_differ": Value(differ, "rows", bar="= 0", passed=differ == 0),
            "cancelled_in_ledger": Value(len(left_rows), "requests"),
            "streams_ended_by_error_at_the_kill": Value(
                sum(end == "error" for end, _ in killed), "streams", bar=f"= {len(killed)}",
                passed=all(end == "error" for end, _ in killed),
            ),
        },
    )  # fmt: skip


async def _mixed_load(url: str, token: str, count: int) -> list[tuple[str, int]]:
    """Send requests of three APIs with 8 at a time. Return how each ended, and the tokens that it was told."""
    turn = asyncio.Semaphore(8)
    headers = {"authorization": f"Bearer {token}"}
    draw = random.Random(0)
    asked = [(number % 4, draw.randint(4, 40), draw.random() < 0.1) for number in range(count)]
    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:

        async def one(kind: int, tokens: int, leaves: bool) -> tuple[str, int]:
            async with turn:
                text = f"Count to {tokens}."
                messages = [{"role": "user", "content": text}]
                body = {"model": "tiny", "max_tokens": tokens, "messages": messages, "temperature": 0.5}
                if leaves:
                    body |= {"stream": True, "max_tokens": 200}
                    async with client.stream(
                        "POST", f"{url}/v1/chat/completions", json=body, headers=headers
                    ) as response:
                        async for _ in response.aiter_lines():
                            break
                    return "left", 0
                if kind == 0:
                    return await watched_stream(client, url, token, tokens)
                if kind == 1:
                    response = await client.post(f"{url}/v1/messages", json=body, headers=headers)
                    name = "output_tokens"
                elif kind == 2:
                    body = {"model": "tiny", "prompt": text, "max_tokens": tokens, "n": 2}
                    response = await client.post(f"{url}/v1/completions", json=body, headers=headers)
                    name = "completion_tokens"
                else:
                    response = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
                    name = "completion_tokens"
                if response.status_code != 200:
                    return f"refused {response.status_code}", 0
                return "whole", response.json()["usage"][name]

        return await asyncio.gather(*(one(*each) for each in asked))


async def _killed(url: str, token: str, child: subprocess.Popen[bytes]) -> list[tuple[str, int]]:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        begun: set[int] = set()
        tasks = [
            asyncio.create_task(watched_stream(client, url, token, number, begun)) for number in range(4)
        ]
        while len(begun) < len(tasks):
            await asyncio.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("row", choices=("latency", "clients", "replicas", "vllm"))
    parser.add_argument("--requests", type=int, default=300, help="of latency and vllm")
    parser.add_argument("--rounds", type=int, default=100, help="of replicas")
    parser.add_argument("--no-litellm", action="store_true", help="do not measure LiteLLM")
    parser.add_argument("--python", type=Path, default=WORK / "vllm" / "bin" / "python", help="of vLLM")
    parser.add_argument("--model", type=Path, help="folder of a model for vLLM")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    {"latency": latency, "clients": clients, "replicas": replicas, "vllm": vllm}[arguments.row](arguments)


if __name__ == "__main__":
    main()
