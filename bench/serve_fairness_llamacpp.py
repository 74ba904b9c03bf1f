"""Measure in llama.cpp's server what `serve_fairness.py` measures in Herd's engine: a long prompt beside decoding clients.

    python bench/serve_fairness_llamacpp.py --server build/bin/llama-server [--commit]    # the build: serve_llamacpp.py

The shape, the prompts' lengths, the rounds and the figures are those of `serve_fairness.py`. The server is started as
users start it, with a place for each client and one for the long prompt. Its figures have no bar.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from pathlib import Path

import httpx

from common import WORK, bench_parser, save_receipt
from herd.llama import SIZES
from herd.machine import cores
from serve_fairness import Client, add_load, figures, one_round
from serve_llamacpp import LLAMA_SERVER, MOST_SECONDS, file_of, running, version


class HttpClient(Client):
    """A reader of an answer of llama.cpp's server."""

    def __init__(self, url: str, prompt: list[int], n_new: int) -> None:
        self.url, self.stopped = url, threading.Event()
        self.body = {"prompt": prompt, "n_predict": n_new, "stream": True, "ignore_eos": True}
        self.body["cache_prompt"] = False
        super().__init__()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/completion", json=self.body, timeout=MOST_SECONDS) as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and json.loads(line[6:]).get("tokens"):
                    self.times.append(time.perf_counter())
                if self.stopped.is_set():
                    return  # closing the connection ends the answer

    def stop(self) -> None:
        self.stopped.set()


def main() -> None:
    """Parse and measure."""
    parser = bench_parser(__doc__)
    parser.add_argument("--server", type=Path, default=LLAMA_SERVER)
    add_load(parser)
    args = parser.parse_args()
    config = SIZES[args.size].replace(n_layers=args.layers)
    file, rng, places = file_of(WORK, config, args.quant), random.Random(0), args.clients + 1
    words = [str(args.server), "-m", str(file), "-np", str(places), "-c", str(places * args.context)]
    words += ["-t", str(cores())]
    with tempfile.TemporaryDirectory() as folder, running(words, Path(folder) / "llama.cpp.log") as url:

        def ask(n_tokens: int, n_new: int, _name: str) -> Client:
            prompt = [rng.randrange(config.vocab_size) for _ in range(n_tokens)]
            return HttpClient(url, prompt, n_new)

        ask(min(2000, args.prompt), 1, "warm up").join()
        rounds = [one_round(ask, args) for _ in range(args.rounds)]
    save_receipt(
        "serve-fairness-llamacpp", seed=0, rivals={"llama.cpp server": version(args.server)},
        what=f"llama.cpp's server: {args.clients} clients decode while a prompt of {args.prompt:,} tokens arrives: "
        f"{args.size} shape with {args.layers} layers, {args.quant}, {cores()} threads",
        values=figures(rounds, {}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
