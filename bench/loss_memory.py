"""Compare peak memory and time of the chunked loss with the plain one, with Llama 3's vocabulary.

    python bench/loss_memory.py            # about 4 minutes on two cores, needs 15 GB for the plain loss

N = 8192 tokens, D = 512, V = 128,256, fp32, with gradients for the hidden states and the weight. Each side runs in
its own process: inputs are made and touched, then the growth of the resident set over the first pass is its
peak. Times are measured alternately, one pass each, with both processes resident. Medians and ratios of paired
turns are reported.

The plain loss is ``F.cross_entropy(hidden @ weight.T, targets)``, which is what `transformers` computes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time

import psutil

from common import at_least, at_most, bench_parser, save_receipt
from contestant import Contestant

N, D, V, SEED = 8192, 512, 128_256, 0
MEMORY_BAR, SPEED_BAR = 1 / 8, 1.0


class PeakAbove:
    """The growth of the resident set during a block, sampled every millisecond."""

    def __enter__(self) -> PeakAbove:
        self.process = psutil.Process()
        self.start = self.top = self.process.memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.top = max(self.top, self.process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.bytes = self.top - self.start


def contestant(side: str, threads: int) -> None:
    """Run a pass for every line on stdin. Answer with its seconds, loss and peak bytes."""
    import torch
    import torch.nn.functional as F

    from herd.kernels import build
    from herd.kernels.loss import linear_cross_entropy

    torch.set_num_threads(threads)
    build.ready()
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)

    def chunked():
        return linear_cross_entropy(hidden, weight, targets)

    def plain():
        return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    forward = chunked if side == "chunked" else plain
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # the thread pool and the matmul library
    for _ in sys.stdin:
        with PeakAbove() as peak:
            began = time.perf_counter()
            loss = forward()
            loss.backward()
            took = time.perf_counter() - began
        print(json.dumps({"seconds": took, "peak": peak.bytes, "loss": loss.item()}), flush=True)
        hidden.grad = weight.grad = None


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.contestant, arguments.threads)
        return
    processes = {side: Contestant.of_this_script(side, arguments.threads) for side in ("plain", "chunked")}
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in processes}
    for turn in range(arguments.rounds + 1):  # the first warms up: its peak counts, its time does not
        for side, process in processes.items():
            turns[side].append(process.ask())
        print(
            turn,
            {side: {k: round(v, 3) for k, v in steps[-1].items()} for side, steps in turns.items()},
            flush=True,
        )
    for process in processes.values():
        process.close()
    report(turns, arguments.threads)


def report(turns: dict[str, list[dict[str, float]]], threads: int) -> None:
    from importlib.metadata import version

    peak = {side: max(int(step["peak"]) for step in steps) for side, steps in turns.items()}
    seconds = {side: [step["seconds"] for step in steps[1:]] for side, steps in turns.items()}
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["chunked"], strict=True)]
    memory, speed = peak["chunked"] / peak["plain"], statistics.median(ratios)
    save_receipt(
        "loss-memory",
        what=f"Linear + cross-entropy, forward and backward, N {N}, D {D}, V {V}, fp32, {threads} threads: "
        "peak resident memory above the inputs, and seconds in turns",
        values={
            "plain_peak": (peak["plain"], "bytes"),
            "chunked_peak": (peak["chunked"], "bytes"),
            "peak_ratio": at_most(MEMORY_BAR, memory, "ratio"),
            "plain_seconds": (statistics.median(seconds["plain"]), "s"),
            "chunked_seconds": (statistics.median(seconds["chunked"]), "s"),
            "speed_ratio": at_least(SPEED_BAR, speed, "ratio", min(ratios), max(ratios)),
        },
        seed=SEED,
        rivals={"torch": version("torch")},
    )


if __name__ == "__main__":
    main()
