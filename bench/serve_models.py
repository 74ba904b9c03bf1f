"""Serve three real models within a budget that holds two, under a mixed load, and watch errors, memory and switches.

    HERD_TEST_DATA=../shared/data python bench/serve_models.py [--minutes 30] [--commit]

SmolLM2-135M-Instruct is served in three formats by one `herd serve` process. Clients ask with pauses. Each keeps to
one model for some requests and then changes, as people do. A request for a model that is not loaded waits until
another one is unloaded. Short answers are greedy, so each model's answer to a prompt must be the same every time,
however often it was unloaded. Memory is the process's resident set, above what it takes before any request.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil

from common import DATA, WORK, at_most, bench_parser, exactly, save_receipt
from herd.report import Value

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS = {"as-downloaded": None, "in-q8": "q8", "in-q4": "q4"}
CLIENTS, CONTEXT, SEED = 6, 1024, 0
BUDGET_GB, CACHE_GB = 0.5, 0.1
PROMPTS = (
    "Name a colour.",
    "What is the capital of Italy? Answer briefly.",
    "Count from one to five.",
    "Say hello.",
)
PAUSE_SECONDS, REQUESTS_PER_TURN = 0.5, 12


@dataclass
class Load:
    """What the clients saw: answers by model and prompt, seconds of each request, and errors."""

    answers: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def model_files(work: Path) -> dict[str, Path]:
    """Return the models by name. Missing ones are quantized."""
    work.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, to in FORMATS.items():
        files[name] = FILE if to is None else work / name
        if not files[name].exists():
            words = ["quantize", str(FILE), "--out", str(files[name]), "--to", str(to)]
            subprocess.run([sys.executable, "-m", "herd", *words], check=True)
    return files


async def client(http: httpx.AsyncClient, names: list[str], number: int, deadline: float, load: Load) -> None:
    """Ask one model for some requests, then another one, until the deadline."""
    rng = random.Random(f"{SEED} {number}")
    while time.monotonic() < deadline:
        name = rng.choice(names)
        for _ in range(REQUESTS_PER_TURN):
            prompt = rng.choice(PROMPTS)
            body = {"model": name, "messages": [{"role": "user", "content": prompt}]}
            start = time.monotonic()
            try:
                response = await http.post(
                    "/v1/chat/completions", json=body | {"max_tokens": 24, "temperature": 0}
                )
                answer = response.json()
                text = answer["choices"][0]["message"]["content"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                load.errors.append(f"{name}: {type(error).__name__} {str(error)[:200]}")
                continue
            load.seconds.append(time.monotonic() - start)
            load.answers.setdefault((name, prompt), Counter())[text] += 1
            await asyncio.sleep(rng.uniform(0, 2 * PAUSE_SECONDS))


async def run_load(url: str, names: list[str], seconds: float) -> Load:
    load = Load()
    deadline = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await asyncio.gather(*(client(http, names, number, deadline, load) for number in range(CLIENTS)))
    return load


class MemoryWatch(threading.Thread):
    """The largest resident set of a process, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self.peak, self.ended = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.peak = max(self.peak, self._process.memory_info().rss)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--work", type=Path, default=WORK / "serve-models")
    args: argparse.Namespace = parser.parse_args()
    files = model_files(args.work)
    names = [path.stem if path.suffix == ".gguf" else path.name for path in files.values()]
    command = [sys.executable, "-m", "herd", "serve", *map(str, files.values()), "--port", "0"]
    command += ["--memory-gb", str(BUDGET_GB), "--cache-gb", str(CACHE_GB), "--context", str(CONTEXT)]
    command += ["--parallel", "8", "--no-keys"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    assert server.stderr is not None
    for line in server.stderr:
        log.append(line)
        if found := re.search(r"for programs: (http://[\w.:]+)", line):
            break
    else:
        raise SystemExit("the server did not start:\n" + "".join(log[-20:]))
    url = found[1]
    reader = threading.Thread(target=lambda: log.extend(server.stderr or ()), daemon=True)
    reader.start()
    base = psutil.Process(server.pid).memory_info().rss
    watch = MemoryWatch(server.pid)
    watch.start()
    try:
        load = asyncio.run(run_load(url, names, 60 * args.minutes))
        lives = server.poll() is None
    finally:
        watch.ended.set()
        server.terminate()
        server.wait(60)
    reader.join(10)
    unloads = sum("unloaded to make room" in line for line in log)
    loads = [float(found.group(1)) for line in log if (found := re.search(r"is loaded in ([\d.]+) s", line))]
    varying = sum(len(texts) > 1 for texts in load.answers.values())
    above = watch.peak - base
    values = {
        "requests": Value(len(load.seconds), "requests"),
        "errors": Value(len(load.errors), "errors", bar="0", passed=not load.errors and lives),
        "prompts_with_several_answers": exactly(0, varying, "prompts"),
        "unloaded": Value(unloads, "times"),
        "load_median": Value(float(np.median(loads)) if loads else None, "s"),
        "load_longest": Value(max(loads, default=None), "s"),
        "request_median": Value(float(np.median(load.seconds)), "s"),
        "request_p95": Value(float(np.quantile(load.seconds, 0.95)), "s"),
        "memory_above_start": at_most(BUDGET_GB * 1e9, above, "bytes", shown=f"<= {BUDGET_GB} GB"),
        "minutes": Value(args.minutes, "min"),
    }
    save_receipt(
        "serve-models", what="three models under a budget that holds two, mixed load",
        values=values, seed=SEED, notes="; ".join(load.errors[:5]) or f"{CLIENTS} clients, budget {BUDGET_GB} GB",
    )  # fmt: skip


if __name__ == "__main__":
    main()
