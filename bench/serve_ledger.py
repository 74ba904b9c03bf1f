"""Load a server with keys, kill it at random moments, and compare its ledger with what clients received.

``load``: 64 clients stream answers of mixed lengths for ``--minutes``, and one in ten hangs up. No request may fail,
and memory, threads, files and pages of the server must stay flat. Then 100 requests at the same moment for a budget
of one, ``--rounds`` times.

``kill``: the server is killed with SIGKILL ``--kills`` times while the 64 clients go on. Requests that were cut off
are sent again with the same Idempotency-Key, as a careful client would, and nothing may be billed twice. At the end
it is killed while clients have stopped reading.

At the end every row of the ledger is compared with what its client received. These are real processes and raw
sockets. The model is tiny and random, so that the engine is not the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from common import bench_parser, exactly, save_receipt
from herd.report import Value
from herd.serve.keys import TokenBudget
from herd.serve.prices import TokenPrice, set_price
from herd.serve.store import Store
from herd.serve.usage import read_usage
from servers import http_request, ledger_rows, new_key
from tiny_server import TinyServers

CLIENTS = 64
CHAT = "/v1/chat/completions"
RACING = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 1}
"""The body of each of the requests that race for a budget of one."""
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "sleeps")
WARM_UP_SECONDS = 60
"""Time until the cache is full, the engine's memory with it."""
PRICE = TokenPrice(prompt=1_500_000, cached=500_000, completion=6_000_000)


@dataclass
class Sent:
    """One request as its client saw it."""

    name: str
    key: str
    tokens: int = 0
    chunk: int = 0
    usage: int | None = None
    end: str = "cut"
    """done, hung up, cut (the connection broke), refused (with the status), unreachable."""


class Client:
    """One client with its own key: one request after the other until it is told to stop."""

    def __init__(self, number: int, token: str, servers: TinyServers, log: list[Sent]) -> None:
        self.number, self._token, self._servers, self._log = number, token, servers, log
        self._draw = random.Random(number)
        self._count = 0

    async def run(self, stop: asyncio.Event, repeat_cut: bool) -> None:
        """Send requests until ``stop``."""
        while not stop.is_set():
            sent = self._new()
            await self._ask(sent)
            if sent.end == "unreachable":
                await asyncio.sleep(0.02)
            elif sent.end == "cut" and repeat_cut:
                again = Sent(sent.name, self._token)
                while again.end in ("cut", "unreachable") and not stop.is_set():
                    again = Sent(sent.name, self._token)
                    await self._ask(again)
                    await asyncio.sleep(0.02)

    def _new(self) -> Sent:
        self._count += 1
        return Sent(f"{self.number}-{self._count}", self._token)

    async def _ask(self, sent: Sent) -> None:
        draw = self._draw
        self._log.append(sent)
        hang_up_after = draw.randint(0, 20) if draw.random() < 0.1 else None
        text = " ".join(draw.choices(WORDS, k=draw.choice((3, 10, 40, 120))))
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": draw.choice((1, 4, 16, 64)),
            "temperature": 1,
            "seed": draw.randrange(1000),
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
        }
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._servers.port)
        except OSError:
            sent.end = "unreachable"
            return
        try:
            writer.write(http_request(CHAT, body, sent.key, sent.name))
            await read_answer(reader, sent, hang_up_after)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader, sent: Sent, hang_up_after: int | None) -> None:
    """Read an answer until its end, or until the client hangs up."""
    status = (await reader.readline()).split()
    if len(status) < 2:
        return
    if status[1] != b"200":
        sent.end = f"refused {status[1].decode()}"
        await reader.read()
        return
    while line := await reader.readline():
        read_line(line, sent)
        if sent.end != "cut":
            return
        if hang_up_after is not None and sent.tokens >= hang_up_after:
            sent.end = "hung up"
            return


def read_line(line: bytes, sent: Sent) -> None:
    """Note the tokens of one line of a stream. Every token has its log-probability, so they can be counted."""
    if not line.startswith(b"data: ") or not line.endswith(b"\n"):
        return
    if line == b"data: [DONE]\n":
        sent.end = "done"
        return
    event = json.loads(line[6:])
    if "error" in event:
        sent.end = "error event"
        return
    if event.get("usage"):
        sent.usage = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        new = len((choice.get("logprobs") or {}).get("content") or ())
        sent.tokens += new
        sent.chunk = max(sent.chunk, new)


async def steady_load(
    clients: list[Client], servers: TinyServers, minutes: float
) -> dict[str, tuple[float, float]]:
    """Run all clients for a time. Return (first, last) of what must stay flat, after a warm-up."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(client.run(stop, repeat_cut=False)) for client in clients]
    process = psutil.Process(servers.pid)
    samples: list[tuple[int, int, int]] = []
    end = time.monotonic() + 60 * minutes
    begin_sampling = time.monotonic() + min(WARM_UP_SECONDS, 24 * minutes)
    while time.monotonic() < end:
        await asyncio.sleep(1)
        if time.monotonic() > begin_sampling:
            samples.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
    stop.set()
    await asyncio.gather(*tasks)
    fifth = max(1, len(samples) // 5)
    first = [sum(values) / fifth for values in zip(*samples[:fifth], strict=True)]
    last = [sum(values) / fifth for values in zip(*samples[-fifth:], strict=True)]
    return dict(zip(("rss", "threads", "files"), zip(first, last, strict=True), strict=True))


async def kill_often(clients: list[Client], servers: TinyServers, kills: int, draw: random.Random) -> None:
    """Kill and start the server while all clients run."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(client.run(stop, repeat_cut=True)) for client in clients]
    for _ in range(kills):
        await asyncio.sleep(draw.uniform(0.1, 2.5))
        await asyncio.to_thread(servers.kill)
        await asyncio.to_thread(servers.start)
    await asyncio.sleep(1)
    stop.set()
    await asyncio.gather(*tasks)


def stalled_readers(tokens: list[str], servers: TinyServers, log: list[Sent]) -> None:
    """Let clients read nothing, kill the server, and then read what the kernels still have."""
    connections = []
    for number, token in enumerate(tokens):
        sent = Sent(f"stalled-{number}", token)
        log.append(sent)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", servers.port))
        body = {
            "messages": [{"role": "user", "content": WORDS[0]}],
            "max_tokens": 900,
            "temperature": 1,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
        }
        connection.sendall(http_request(CHAT, body, sent.key, sent.name))
        connections.append((connection, sent))
    time.sleep(10)
    servers.kill()
    for connection, sent in connections:
        data = b""
        connection.settimeout(10)
        with suppress(OSError):
            while piece := connection.recv(1 << 16):
                data += piece
        connection.close()
        for line in data.splitlines(keepends=True):
            read_line(line, sent)
    servers.start()


async def race(token: str, servers: TinyServers, name: str) -> Counter[str]:
    """Send 100 requests at the same moment, and return how many got which status."""
    connections = [await asyncio.open_connection("127.0.0.1", servers.port) for _ in range(100)]
    for number, (_, writer) in enumerate(connections):
        writer.write(http_request(CHAT, RACING, token, f"{name}-{number}"))

    async def status(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        line = await reader.readline()
        await reader.read()
        writer.close()
        return line.split()[1].decode()

    return Counter(await asyncio.gather(*(status(*connection) for connection in connections)))


def worst_case(token: str, servers: TinyServers) -> int:
    """Return the tokens that one request of `race` reserves: its prompt and one token."""
    headers = {"authorization": f"Bearer {token}"}
    answer = httpx.post(f"http://127.0.0.1:{servers.port}{CHAT}", json=RACING, headers=headers)
    return answer.json()["usage"]["prompt_tokens"] + 1


def compare(store: Store, log: list[Sent]) -> Counter[str]:
    """Compare each row of the ledger with what its client received. Return counts of agreement and of faults."""
    rows = {row.id: row for row in ledger_rows(store)}
    counts: Counter[str] = Counter()
    # A server that is behind sends the tokens of several steps as one chunk, and the last chunk may be lost.
    largest = max((sent.chunk for sent in log), default=1) + 1  # the stop token comes with the last token
    tries: dict[str, list[Sent]] = {}
    for sent in log:
        if sent.end != "unreachable":
            tries.setdefault(sent.name, []).append(sent)
    for name, all_tries in tries.items():
        counts["requests"] += 1
        row = rows.get(name)
        answered = [sent for sent in all_tries if not sent.end.startswith("refused")]
        billed = row.completion_tokens if row is not None else 0
        if row is not None and row.status == "open":
            counts["left_open"] += 1
        if sum(sent.tokens > 0 for sent in answered) > 1:
            counts["delivered_twice"] += 1
        if len(all_tries) > 1:
            counts["repeated"] += 1
        best = max(answered, key=lambda sent: sent.tokens, default=None)
        if best is None:
            counts["never_answered"] += 1
            continue
        if best.end == "done":
            counts["finished"] += 1
            counts["finished_unequal"] += not (best.usage is None or billed == best.usage)
            counts["finished_less_than_received"] += billed < best.tokens
        elif best.end == "hung up":
            counts["hung_up"] += 1
            counts["hung_up_billed_less"] += billed < best.tokens
            counts["hung_up_tokens_more"] += max(0, billed - best.tokens)
        else:
            counts["cut"] += 1
            counts["cut_while_streaming"] += best.tokens > 0
            more = billed - best.tokens
            counts["cut_billed_less"] += more < 0
            counts["cut_billed_over_a_chunk_more"] += more > largest
            if more > max(best.chunk, 1) + 1:
                print(
                    f"{name}: {billed} billed, {best.tokens} received, its largest chunk {best.chunk}",
                    flush=True,
                )
    for row in rows.values():
        price = PRICE.cost(row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        counts["wrong_money"] += row.status != "open" and row.money != price
    by_day = read_usage(store)
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "money"):
        counts["sums_unequal"] += sum(getattr(row, name) for row in by_day) != sum(
            getattr(row, name) for row in rows.values()
        )
    counts["reserved_left"] = sum(row.reserved_tokens + row.reserved_money for row in by_day)
    counts["largest_chunk"] = largest - 1
    counts["tokens"] = sum(row.completion_tokens for row in rows.values())
    return counts


async def load(arguments: argparse.Namespace, store: Store, servers: TinyServers) -> dict[str, Value]:
    """Run the clients for some minutes, and then the races for a budget of one."""
    log: list[Sent] = []
    clients, tokens = new_clients(store, servers, log)
    watcher = new_key(store, "watcher", scopes={"metrics"})
    flat = await steady_load(clients, servers, arguments.minutes)
    await asyncio.sleep(1)
    place, headers = f"http://127.0.0.1:{servers.port}/herd/v1/stats", {"x-api-key": watcher}
    idle = httpx.get(place, headers=headers).json()["tiny"]
    ends = Counter(sent.end for sent in log)
    print(dict(ends), flat, idle, flush=True)

    need = worst_case(tokens[0], servers)
    exact = 0
    for number in range(arguments.rounds):
        budgets = (TokenBudget(unit="tokens", period="day", amount=2 * need - 1),)
        token = new_key(store, f"race {number}", budgets=budgets)
        exact += await race(token, servers, f"race-{number}") == {"200": 1, "429": 99}
    await asyncio.to_thread(servers.stop)
    counts = compare(store, log)
    growth = {f"{name}_growth": Value(last / first - 1, "1") for name, (first, last) in flat.items()}
    return {
        "requests": Value(len(log), "requests"),
        "tokens": Value(counts["tokens"], "tokens"),
        "hung_up": Value(counts["hung_up"], "requests"),
        "hung_up_tokens_more": Value(
            counts["hung_up_tokens_more"] / max(counts["hung_up"], 1), "tokens per request"
        ),
        "failed": exactly(0, len(log) - ends["done"] - ends["hung up"], "requests"),
        "active_when_idle": exactly(0, int(idle["active"] + idle["waiting"]), "requests"),
        "pages_when_idle": exactly(0, int(idle["used_pages"]), "pages"),
        **growth,
        "races": Value(arguments.rounds, "rounds"),
        "races_with_one_winner": exactly(arguments.rounds, exact, "rounds"),
        **faults(counts),
    }


async def kill(arguments: argparse.Namespace, store: Store, servers: TinyServers) -> dict[str, Value]:
    """Kill the server while the clients run, and once more while clients do not read."""
    log: list[Sent] = []
    clients, tokens = new_clients(store, servers, log)
    await kill_often(clients, servers, arguments.kills, random.Random(arguments.seed))
    print(dict(Counter(sent.end for sent in log)), flush=True)
    stalled: list[Sent] = []
    await asyncio.to_thread(stalled_readers, tokens[:8], servers, stalled)
    print("tokens of stalled readers:", [sent.tokens for sent in stalled], flush=True)
    log += stalled
    await asyncio.to_thread(servers.stop)
    counts = compare(store, log)
    return {
        "kills": Value(arguments.kills + 1, "kills"),
        "requests": Value(counts["requests"], "requests"),
        "cut": Value(counts["cut"], "requests"),
        "cut_while_streaming": Value(counts["cut_while_streaming"], "requests"),
        "stalled_readers": Value(len(stalled), "requests"),
        "repeated": Value(counts["repeated"], "requests"),
        "tokens": Value(counts["tokens"], "tokens"),
        "largest_chunk": Value(counts["largest_chunk"], "tokens"),
        **faults(counts),
    }


def new_clients(store: Store, servers: TinyServers, log: list[Sent]) -> tuple[list[Client], list[str]]:
    """Make a key for each client, and start the server."""
    tokens = [new_key(store, f"client {n}") for n in range(CLIENTS)]
    servers.start()
    return [Client(number, token, servers, log) for number, token in enumerate(tokens)], tokens


def faults(counts: Counter[str]) -> dict[str, Value]:
    """Return the faults that `compare` found, none of which may be."""
    names = (
        "left_open", "delivered_twice", "finished_unequal", "finished_less_than_received", "hung_up_billed_less",
        "cut_billed_less", "cut_billed_over_a_chunk_more", "wrong_money", "sums_unequal", "reserved_left",
    )  # fmt: skip
    return {name: exactly(0, counts[name], "faults") for name in names}


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("part", choices=("load", "kill"))
    parser.add_argument("--minutes", type=float, default=10, help="length of the load")
    parser.add_argument("--rounds", type=int, default=100, help="races of 100 requests for a budget of one")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "serve.db"
        store = Store(place)
        set_price(store, "tiny", PRICE, "EUR", "bench")
        servers = TinyServers(place)
        try:
            values = asyncio.run((load if arguments.part == "load" else kill)(arguments, store, servers))
        finally:
            servers.close()
            store.close()
    what = {
        "load": "64 streaming clients with keys, and races for a budget of one: the ledger and what clients received",
        "kill": "herd serve killed under 64 streaming clients: the ledger and what clients received",
    }[arguments.part]
    name = f"serve-ledger-{arguments.part}"
    save_receipt(name, what=what, values=values, seed=arguments.seed)


if __name__ == "__main__":
    main()
