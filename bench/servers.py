"""Servers for benches: `herd serve` in this process or in one of its own, also as a gateway, and its ledger."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sql

from common import WORK
from herd.serve.app import create_app
from herd.serve.keys import KeyPolicy, create_key
from herd.serve.run import HerdServer
from herd.serve.settings import ServeSettings
from herd.serve.store import Store
from herd.serve.tables import requests

UPSTREAM_KEY = "HERD_UPSTREAM_KEY"
TELLS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
"""Fields of a request for a stream whose every chunk has the usage so far."""


@contextmanager
def serving(served: Any, store: Store | None = None, tools: Any = None) -> Iterator[str]:
    """Run `herd serve`'s application in a thread and yield its address. The model is closed at the end."""
    settings = ServeSettings(drain_seconds=2)
    ready, ports = threading.Event(), list[int]()
    app = create_app(served, store, settings, tools)
    server = HerdServer(app, settings, 0, lambda port: (ports.append(port), ready.set()))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30), "the server does not start"
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        server.should_exit = True
        thread.join()
        served.close()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def process(
    *words: str, log: Path | None = None, without: Sequence[str] = (), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a process group of its own, and end the group. If the block fails, print the end of its log.

    ``environment`` is added to this process's, ``without`` are names that are left out of it.
    """
    out = subprocess.DEVNULL if log is None else log.open("wb")
    kept = {name: value for name, value in os.environ.items() if name not in without}
    child = subprocess.Popen(
        words, env=kept | environment, stdout=out, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        yield child
    except BaseException:
        if log is not None:
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:], flush=True)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def wait_for(url: str, child: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until an address answers with 200."""
    end = time.monotonic() + seconds
    while True:
        assert child.poll() is None, f"the server for {url} ended at its start"
        assert time.monotonic() < end, f"{url} does not answer"
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.1)


@contextmanager
def gateway(store: str, *upstreams: str, key: str = "none", log: Path | None = None) -> Iterator[str]:
    """Run `herd serve` in front of other servers and yield its address. Any name means their first model."""
    port = free_port()
    words = [sys.executable, "-m", "herd", "serve", "--port", str(port), "--store", store, "--keys"]
    words += ["--alias", "*"]
    for upstream in upstreams:
        words += ["--upstream", upstream]
    with process(*words, log=log, **{UPSTREAM_KEY: key}) as child:
        wait_for(f"http://127.0.0.1:{port}/readyz", child)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def vllm(model: Path, *more: str, python_path: str = "") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a real vLLM on the CPU with a model folder, named ``tiny``, and yield its address and process.

    ``more`` are further words of its command.
    """
    port = free_port()
    words = [str(WORK / "vllm" / "bin" / "vllm"), "serve", str(model), "--dtype", "bfloat16"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": python_path, "OMP_NUM_THREADS": "2"}
    words += ["--max-model-len", "1024", *more]
    with process(*words, log=WORK / "vllm.log", **settings) as child:
        wait_for(f"http://127.0.0.1:{port}/health", child, 1800)
        yield f"http://127.0.0.1:{port}", child


@contextmanager
def scripted_upstream(n_pieces: int) -> Iterator[str]:
    """Run a scripted server in a process of its own and yield its address."""
    port = free_port()
    script = Path(__file__).with_name("scripted_upstream.py")
    with process(sys.executable, str(script), str(port), str(n_pieces)) as child:
        wait_for(f"http://127.0.0.1:{port}/v1/models", child)
        yield f"http://127.0.0.1:{port}"


def http_request(path: str, body: dict[str, Any], key: str = "any", name: str = "") -> bytes:
    """Return the bytes of a POST request, for a client on a raw socket. ``name`` is its Idempotency-Key."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}", "Connection: close",
        "Content-Type: application/json", f"Content-Length: {len(data)}",
    ]  # fmt: skip
    if name:
        lines.append(f"Idempotency-Key: {name}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def new_key(store: Store, name: str, **policy: Any) -> str:
    """Create a key and return its token."""
    return create_key(store, name, KeyPolicy(**policy), actor="bench")[1]


def ledger_rows(store: Store, token: str = "") -> list[Any]:
    """Return the rows of requests in the ledger: all, or those of a key."""
    of_key = requests.c.key_id == token.split("-")[1] if token else sql.true()
    with store.read() as connection:
        return list(connection.execute(sql.select(requests).where(of_key)))


@dataclass
class Told:
    """What a client was told about its request, which is billed under ``name``."""

    name: str
    end: str = "cut"
    """whole, error (an event), left (the client hung up), cut, refused (with the status)."""
    prompt_tokens: int = 0
    tokens: int = 0

    def agrees_with(self, row: Any) -> bool:
        """Whether the ledger's row is what the client was told. One that hung up may be billed what was sent."""
        if row is None:
            return self.end.startswith("refused") or self.tokens == 0
        if self.end == "left":
            return row.completion_tokens >= self.tokens
        return (row.prompt_tokens, row.completion_tokens) == (self.prompt_tokens, self.tokens)


async def watched_stream(
    client: httpx.AsyncClient, told: Told, token: str, body: dict[str, Any], leave_after: int | None = None
) -> Told:
    """Stream a chat completion of ``tiny`` and note what the chunks tell, until its end or so many tokens."""
    headers = {"authorization": f"Bearer {token}", "idempotency-key": told.name}
    body = {"model": "tiny"} | body | TELLS
    with suppress(httpx.HTTPError):
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                told.end = f"refused {response.status_code}"
                return told
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    told.end = "whole"
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        told.end = "error"
                    elif usage := event.get("usage"):
                        told.prompt_tokens, told.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                        if leave_after is not None and told.tokens >= leave_after:
                            told.end = "left"
                            return told
    return told


async def streams_at_a_kill(
    client: httpx.AsyncClient, tolds: list[Told], token: str, n_begun: int, kill: Callable[[], object]
) -> None:
    """Stream long answers, and kill a server once ``n_begun`` of them have some text."""
    bodies = [
        {"messages": [{"role": "user", "content": f"{number} jumps"}], "max_tokens": 800}
        for number in range(len(tolds))
    ]
    tasks = [
        asyncio.create_task(watched_stream(client, told, token, body))
        for told, body in zip(tolds, bodies, strict=True)
    ]
    while sum(told.tokens > 0 for told in tolds) < n_begun:
        assert not all(task.done() for task in tasks), "the answers ended before the kill"
        await asyncio.sleep(0.01)
    kill()
    await asyncio.gather(*tasks)


def n_disagreements(store: Store, token: str, tolds: list[Told]) -> int:
    """Return how many requests of a key were billed otherwise than their clients were told."""
    rows = {row.id: row for row in ledger_rows(store, token)}
    return sum(not told.agrees_with(rows.get(told.name)) for told in tolds) + len(
        rows.keys() - {told.name for told in tolds}
    )
