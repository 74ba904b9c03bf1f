"""Serve the same blocks with Herd and with llama.cpp's server to the same clients, in turns.

    cmake -S LLAMA.CPP -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF && cmake --build build --target llama-server
    HERD_TEST_DATA=../shared/data python bench/serve_llamacpp.py --server build/bin/llama-server [--commit]

The source of llama.cpp is in the package of llama-cpp-python (`vendor/llama.cpp`). Random weights of a published
shape, with Meta's tokenizer. Each server keeps its model and waits while the other one works. In a round, every
client sends its requests one after the other: a text of its own of about 256 tokens, 64 tokens of answer, streamed.
Both servers are started as users start them, with as many places as there are clients. A ratio is the median of the
rounds' ratios. About 15 minutes on two cores.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import httpx
import numpy as np

from common import DATA, WORK, at_least, bench_parser, save_receipt
from herd.checkpoint import write_random
from herd.llama import SIZES, ModelConfig
from herd.machine import cores
from herd.quant import scheme
from herd.report.receipt import Value
from herd.text import Tokenizer
from servers import free_port, process, wait_for

PROMPT_CHARS, NEW = 1000, 64
CONTEXT = 1024
"""Tokens of each place: the longest prompt and answer."""
MOST_SECONDS = 600
LLAMA_SERVER = WORK / "llama-server" / "build" / "bin" / "llama-server"


def file_of(work: Path, config: ModelConfig, quant: str) -> Path:
    """Return the file of random weights of a shape, written if it is not there."""
    path = work / f"{config.dim}x{config.n_layers}-{quant}-tokenizer.gguf"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_file(DATA / "llama3_tokenizer" / "tokenizer.model")
        write_random(path, config, scheme(quant), tokenizer=tokenizer)
    return path


@contextmanager
def running(words: list[str], log: Path) -> Iterator[str]:
    """Run a server in its own process, and yield its address when it answers."""
    port = free_port()
    # llama.cpp's threads must wait as its authors chose, and not as the shell says
    waiting = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    with process(*words, "--port", str(port), log=log, without=waiting) as child:
        wait_for(f"http://127.0.0.1:{port}/v1/models", child, 120)
        yield f"http://127.0.0.1:{port}"


async def answer(client: httpx.AsyncClient, prompt: str) -> tuple[int, float]:
    """Return the tokens of a streamed answer, and the seconds until its first."""
    body = {
        "model": "m", "prompt": prompt, "max_tokens": NEW, "stream": True, "temperature": 0.8,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    start, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - start
            usage = json.loads(line[6:]).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    return tokens, first


async def load(url: str, prompts: list[list[str]]) -> tuple[float, float]:
    """Let a client for each list send its prompts. Return tokens per second and the 95th percentile of TTFT."""
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=MOST_SECONDS, limits=limits) as client:

        async def one(texts: list[str]) -> list[tuple[int, float]]:
            return [await answer(client, text) for text in texts]

        start = time.perf_counter()
        found = [pair for pairs in await asyncio.gather(*map(one, prompts)) for pair in pairs]
        seconds = time.perf_counter() - start
    return sum(n for n, _ in found) / seconds, float(np.percentile([first for _, first in found], 95))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--server", type=Path, default=LLAMA_SERVER)
    parser.add_argument("--size", default="1B", choices=list(SIZES))
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument(
        "--requests", type=int, default=48, help="requests of a round, divided among the clients"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    file, threads = file_of(WORK, SIZES[args.size], args.quant), str(cores())
    text = (DATA / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    texts = (text[at : at + PROMPT_CHARS] for at in range(0, len(text) - PROMPT_CHARS, PROMPT_CHARS))
    values: dict[str, Value] = {}
    for n in args.clients:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            store = str(Path(folder) / "serve.db")
            herd = [sys.executable, "-m", "herd", "serve", str(file), "--parallel", str(n), "--context", str(CONTEXT),
                    "--threads", threads, "--store", store, "--alias", "m", "--no-page"]  # fmt: skip
            llama = [str(args.server), "-m", str(file), "-np", str(n), "-c", str(n * CONTEXT), "-t", threads]
            urls = {
                name: stack.enter_context(running(words, Path(folder) / f"{name}.log"))
                for name, words in {"herd": herd, "llama.cpp": llama}.items()
            }
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
            for round_ in range(args.rounds + 1):  # the first warms both up
                for name, url in urls.items():
                    each = 1 if round_ == 0 else max(1, args.requests // n)
                    prompts = [list(islice(texts, each)) for _ in range(n)]
                    pair = asyncio.run(load(url, prompts))
                    print(
                        f"{n} clients, round {round_}, {name}: {pair[0]:.1f} tokens/s, TTFT {pair[1]:.2f} s",
                        flush=True,
                    )
                    if round_:
                        found[name].append(pair)
        values |= compared(n, found)
    save_receipt(
        "serve-llamacpp",
        what=f"{args.size} shape, {args.quant}, served by Herd and by llama.cpp's server to the same clients",
        values=values, seed=0, rivals={"llama.cpp server": version(args.server)},
        notes=f"{threads} threads; {args.rounds} rounds of {args.requests} requests of about 256 + {NEW} tokens",
    )  # fmt: skip


def compared(n: int, found: dict[str, list[tuple[float, float]]]) -> dict[str, Value]:
    """Return the medians of both, and the medians of the rounds' ratios with their bars."""
    import torch

    least = 1.8 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1.3
    values = {}
    for name, pairs in found.items():
        rates, firsts = zip(*pairs, strict=True)
        values[f"{n} clients, {name}: speed"] = Value(statistics.median(rates), "tokens/s")
        values[f"{n} clients, {name}: TTFT, 95th percentile"] = Value(statistics.median(firsts), "s")
    both = list(zip(found["herd"], found["llama.cpp"], strict=True))
    faster, sooner = ([ours[i] / theirs[i] for ours, theirs in both] for i in (0, 1))
    speed, wait = statistics.median(faster), statistics.median(sooner)
    values[f"{n} clients: speed, Herd / llama.cpp"] = at_least(least, speed, "×", min(faster), max(faster))
    values[f"{n} clients: TTFT, Herd / llama.cpp"] = Value(
        wait, "×", min(sooner), max(sooner), bar="< 1", passed=wait < 1
    )
    return values


def version(server: Path) -> str:
    done = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[0]


if __name__ == "__main__":
    main()
