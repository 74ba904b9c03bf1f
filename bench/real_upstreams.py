"""The rows of `serve_gateway.py` in which real servers are behind the gateway.

``clients``: two Herds with the same tiny model. One of them is killed while `STREAMS` answers are under way: each must
end whole, or with an error event, and be billed exactly. (`serve_sdk.py --gateway two` sends the SDKs' tests through such a gateway.)

``vllm``: a real vLLM on the CPU with a model folder (``--model``). ``--requests`` chats, completions and messages by
`CLIENTS` clients, of which one in ten hangs up. The last `KILLED` are streams under which vLLM is killed. Each bill
must be what its client was told.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

import servers
from common import exactly, save_receipt
from herd.report import Value
from herd.serve.store import Store
from servers import Told, gateway, ledger_rows, n_disagreements, new_key, streams_at_a_kill, watched_stream
from tiny_server import TinyServers

STREAMS = 24
CLIENTS, KILLED = 8, 8


def http_client(url: str) -> httpx.AsyncClient:
    """Return a patient client of a gateway."""
    return httpx.AsyncClient(base_url=url, timeout=300, trust_env=False)


def clients(arguments: argparse.Namespace) -> None:
    """Kill one of two Herds behind a gateway."""
    before, after = (
        [Told(f"{when}{n}") for n in range(count)] for when, count in (("before", STREAMS), ("after", 6))
    )

    async def ask() -> None:
        async with http_client(url) as client:
            await streams_at_a_kill(
                client, before, token, STREAMS * 3 // 4, lambda: os.kill(herds[1].pid, signal.SIGKILL)
            )
            for told in after:
                body = {"messages": [{"role": "user", "content": told.name}], "max_tokens": 800}
                await watched_stream(client, told, token, body)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        behind, store = Store(Path(folder) / "behind.db"), Store(Path(folder) / "serve.db")
        herds = [TinyServers(Path(folder) / "behind.db", max_batch=16) for _ in range(2)]
        for herd in herds:
            herd.start()
            stack.callback(herd.close)
            stack.callback(lambda herd=herd: herd.pid and herd.stop())
        urls = [f"http://127.0.0.1:{herd.port}" for herd in herds]
        url = stack.enter_context(gateway(f"{folder}/serve.db", *urls, key=new_key(behind, "gateway")))
        token = new_key(store, "streams")
        asyncio.run(ask())
        herds[1].pid = 0
        time.sleep(1)
        differ = n_disagreements(store, token, before + after)
        reserved = sum(row.reserved_tokens for row in ledger_rows(store))
    ends = Counter(told.end for told in before)
    n_well, n_later = ends["whole"] + ends["error"], sum(told.end == "whole" for told in after)
    save_receipt(
        "serve-gateway-clients",
        what=f"{STREAMS} streams through a gateway before two Herds, one of which is killed",
        values={
            "streams_ended_well": Value(
                n_well, "streams", bar=f"= {STREAMS}, some by an error", passed=n_well == STREAMS and ends["error"] > 0
            ),
            "streams_ended_by_error": Value(ends["error"], "streams"),
            "later_streams_whole": exactly(6, n_later, "streams"),
            "rows_that_differ": exactly(0, differ, "rows"),
            "still_reserved": exactly(0, reserved, "tokens"),
            "tokens_of_streams": Value(sum(told.tokens for told in before + after), "tokens"),
        },
    )  # fmt: skip


def vllm(arguments: argparse.Namespace) -> None:
    """Check a gateway before a real vLLM."""
    load = [Told(f"load{number}") for number in range(arguments.requests - KILLED)]
    killed = [Told(f"killed{number}") for number in range(KILLED)]

    async def ask() -> None:
        async with http_client(url) as client:
            await mixed_load(client, token, load)
            await streams_at_a_kill(
                client, killed, token, KILLED, lambda: os.killpg(child.pid, signal.SIGKILL)
            )

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        behind, child = stack.enter_context(servers.vllm(arguments.model))
        store = Store(Path(folder) / "serve.db")
        url = stack.enter_context(gateway(f"{folder}/serve.db", behind))
        token = new_key(store, "load")
        asyncio.run(ask())
        time.sleep(2)
        differ = n_disagreements(store, token, load + killed)
        rows = {row.id: row for row in ledger_rows(store, token)}
        reserved = sum(row.reserved_tokens for row in rows.values())
        store.close()
    ends = Counter(told.end for told in load)
    left = [rows[told.name].completion_tokens - told.tokens for told in load if told.end == "left"]
    n_errors = sum(told.end == "error" for told in killed)
    save_receipt(
        "serve-gateway-vllm",
        what="A gateway before a real vLLM on the CPU: mixed load, clients that hang up, and a kill",
        values={
            "whole": Value(ends["whole"], "requests"),
            "hung_up": Value(ends["left"], "requests"),
            "hung_up_tokens_more": Value(sum(left) / max(1, len(left)), "tokens per request"),
            "failed": exactly(0, len(load) - ends["whole"] - ends["left"], "requests"),
            "streams_ended_by_error_at_the_kill": exactly(KILLED, n_errors, "streams"),
            "tokens_of_killed_streams": Value(sum(told.tokens for told in killed), "tokens"),
            "bills_that_differ": exactly(0, differ, "requests"),
            "still_reserved": exactly(0, reserved, "tokens"),
            "tokens": Value(sum(row.completion_tokens for row in rows.values()), "tokens"),
        },
    )


async def mixed_load(client: httpx.AsyncClient, token: str, tolds: list[Told]) -> None:
    """Send requests of three APIs, `CLIENTS` at a time, and note how each ended and what it was told."""
    turn, draw = asyncio.Semaphore(CLIENTS), random.Random(0)

    async def one(number: int, told: Told, tokens: int, leave_after: int | None) -> None:
        async with turn:
            chat = {"messages": [{"role": "user", "content": f"Count to {tokens}."}], "temperature": 0.5}
            body: dict[str, Any] = {"model": "tiny", "max_tokens": tokens}
            if leave_after is not None:
                await watched_stream(client, told, token, chat | {"max_tokens": 200}, leave_after)
            elif number % 4 == 0:
                await watched_stream(client, told, token, chat | {"max_tokens": tokens})
            elif number % 4 == 1:
                await whole_answer(client, told, token, "/v1/messages", body | chat)
            elif number % 4 == 2:
                body |= {"prompt": f"Count to {tokens}.", "n": 2}
                await whole_answer(client, told, token, "/v1/completions", body)
            else:
                await whole_answer(client, told, token, "/v1/chat/completions", body | chat)

    asked = [
        (draw.randint(4, 40), draw.randint(1, 30) if draw.random() < 0.1 else None) for _ in range(len(tolds))
    ]
    await asyncio.gather(
        *(one(number, told, *each) for number, (told, each) in enumerate(zip(tolds, asked, strict=True)))
    )


async def whole_answer(
    client: httpx.AsyncClient, told: Told, token: str, path: str, body: dict[str, Any]
) -> None:
    """Ask for an answer that is not streamed, and note its usage."""
    headers = {"authorization": f"Bearer {token}", "idempotency-key": told.name}
    response = await client.post(path, json=body, headers=headers)
    if response.status_code != 200:
        told.end = f"refused {response.status_code}"
        return
    usage = response.json()["usage"]
    told.prompt_tokens = usage.get("prompt_tokens") or usage["input_tokens"]
    told.tokens = usage.get("completion_tokens") or usage["output_tokens"]
    told.end = "whole"
