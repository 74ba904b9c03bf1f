"""Measure in llama.cpp's server what `serve_fairness.py` measures in Herd's engine: a long prompt beside decoding clients.

    python bench/serve_fairness_llamacpp.py --server build/bin/llama-server [--commit]    # the build: serve_llamacpp.py

The shape, the prompts' lengths, the rounds and the figures are those of `serve_fairness.py`. The server is started as
users start it, with a place for each client and one for the long prompt. Its figures have no bar.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

from common import WORK, bench_parser, save_receipt
from herd.llama import SIZES
from herd.machine import cores
from herd.report.receipt import Value
from serve_fairness import gaps
from serve_llamacpp import MOST_SECONDS, Server, file_of, version


class HttpClient(threading.Thread):
    """A reader of one streamed answer that notes the time of each token."""

    def __init__(self, url: str, prompt: list[int], n_predict: int) -> None:
        super().__init__(daemon=True)
        self.url, self.times, self.stopped = url, list[float](), threading.Event()
        self.body = {
            "prompt": prompt,
            "n_predict": n_predict,
            "stream": True,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/completion", json=self.body, timeout=MOST_SECONDS) as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and json.loads(line[6:]).get("tokens"):
                    self.times.append(time.perf_counter())
                if self.stopped.is_set():
                    return  # closing the connection ends the answer


def main() -> None:
    """Parse and measure."""
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--server", type=Path, default=WORK / "llama-server" / "build" / "bin" / "llama-server"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--client-prompt", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=24_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="time of decoding before the long prompt")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    config = SIZES["1B"].replace(n_layers=args.layers)
    file, rng, places = file_of(WORK, config, "q4"), random.Random(0), args.clients + 1
    words = [
        str(args.server),
        "-m",
        str(file),
        "-np",
        str(places),
        "-c",
        str(places * args.context),
        "-t",
        str(cores()),
    ]

    def ask(server: Server, n_tokens: int, n_predict: int) -> HttpClient:
        prompt = [rng.randrange(config.vocab_size) for _ in range(n_tokens)]
        return HttpClient(f"http://127.0.0.1:{server.port}", prompt, n_predict)

    def first_token(server: Server, n_tokens: int) -> float:
        start, client = time.perf_counter(), ask(server, n_tokens, 1)
        client.join()
        return client.times[0] - start

    rounds = []
    with tempfile.TemporaryDirectory() as folder, Server(words, Path(folder) / "llama.cpp.log") as server:
        first_token(server, 2000)  # warm up
        for _ in range(args.rounds):
            alone = first_token(server, args.prompt)
            clients = [
                ask(server, args.client_prompt, args.context - args.client_prompt)
                for _ in range(args.clients)
            ]
            while any(len(client.times) < 3 for client in clients):
                time.sleep(0.01)
            begin = time.perf_counter()
            time.sleep(args.seconds)
            middle = time.perf_counter()
            beside = first_token(server, args.prompt)
            end = time.perf_counter()
            for client in clients:
                client.stopped.set()
                client.join()
            p95 = [
                float(np.percentile(gaps(clients, *when), 95)) for when in ((begin, middle), (middle, end))
            ]
            rounds.append({"p95_before_s": p95[0], "p95_during_s": p95[1], "slower": p95[1] / p95[0],
                           "first_token_alone_s": alone, "first_token_beside_s": beside, "later": beside / alone})  # fmt: skip
            print(rounds[-1], flush=True)
    save_receipt(
        "serve-fairness-llamacpp", commit=args.commit, seed=0, rivals={"llama.cpp server": version(args.server)},
        what=f"llama.cpp's server: {args.clients} clients decode while a prompt of {args.prompt:,} tokens arrives: 1B shape "
        f"with {args.layers} layers, q4, {cores()} threads",
        values={
            key: Value(statistics.median(each[key] for each in rounds), "s" if key.endswith("_s") else "1") for key in rounds[0]
        },
        notes=f"medians of {args.rounds} rounds",
    )  # fmt: skip


if __name__ == "__main__":
    main()
