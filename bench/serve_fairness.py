"""Measure how much a long prompt delays the answers of others, and others delay it.

A random model of a published shape is served by an `EngineLoop` to several clients, each a thread that reads its
own answer. A round measures three things, one after the other:

    alone     the seconds to the first token of a long prompt, with nothing else to compute;
    before    the times between two tokens of each of the clients, which decode together;
    during    the same times while another owner's long prompt (new tokens, nothing cached) is computed,
              and the seconds to its first token.

The 95th percentile of the times during, divided by the same before, is what the clients notice. The receipt
has medians over the rounds.

With ``--agents`` three agents take 20 turns each at the same time instead. An agent begins with a preamble of its
own, and every turn has all before it, the answer, and 150 new tokens, as after a tool. The receipt has the share of
the prompts after the first that was cached.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from common import at_least, bench_parser, save_receipt
from herd.engine import Engine, EngineLoop, Generation, Request, Sampling
from herd.llama import SIZES
from herd.quant import scheme
from herd.quant.random import random_quantized
from herd.report.receipt import Value

SLOWER, LATER = 3.0, 1.5
"""Bars: the others' 95th percentile during / before, and the long prompt's first token beside others / alone."""


class Client(threading.Thread, ABC):
    """A reader of one answer that notes the time of each token."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.times = list[float]()
        self.start()

    @abstractmethod
    def stop(self) -> None:
        """End the answer."""


class EngineClient(Client):
    """A reader of an answer of an engine."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        super().__init__()

    def run(self) -> None:
        for delta in self.generation:
            self.times += [time.perf_counter()] * len(delta.token_ids)

    def stop(self) -> None:
        self.generation.cancel()


def gaps(clients: Sequence[Client], start: float, end: float) -> np.ndarray:
    """Return the times between neighbouring tokens of one client of which the later came in this interval."""
    return np.concatenate(
        [[b - a for a, b in zip(c.times, c.times[1:], strict=False) if start < b <= end] for c in clients]
    )


def one_round(ask: Callable[[int, int, str], Client], args: argparse.Namespace) -> dict[str, float]:
    """Measure one round. ``ask`` sends a prompt of so many tokens for so many tokens, under a name."""

    def first_token() -> float:
        start, client = time.perf_counter(), ask(args.prompt, 1, "long")
        client.join()
        return client.times[0] - start

    alone = first_token()
    limit = args.context - args.client_prompt
    clients = [ask(args.client_prompt, limit, f"client {i}") for i in range(args.clients)]
    while any(len(client.times) < 3 for client in clients):
        time.sleep(0.01)
    begin = time.perf_counter()
    time.sleep(args.seconds)
    middle = time.perf_counter()
    beside = first_token()
    end = time.perf_counter()
    for client in clients:
        client.stop()
        client.join()
    before, during = gaps(clients, begin, middle), gaps(clients, middle, end)
    assert len(during) > args.clients, "no client got a token while the prompt was computed"
    p95 = [float(np.percentile(some, 95)) for some in (before, during)]
    print(
        f"alone {alone:.2f} s, beside others {beside:.2f} s; time per token {np.median(before) * 1e3:.1f} ms, p95 "
        f"{p95[0] * 1e3:.1f} ms, during {np.median(during) * 1e3:.1f} ms, p95 {p95[1] * 1e3:.1f} ms, "
        f"largest {during.max() * 1e3:.1f} ms",
        flush=True,
    )
    return {
        "p95_before_s": p95[0],
        "p95_during_s": p95[1],
        "slower": p95[1] / p95[0],
        "largest_gap_s": float(during.max()),
        "first_token_alone_s": alone,
        "first_token_beside_s": beside,
        "later": beside / alone,
    }


def figures(rounds: list[dict[str, float]], bars: Mapping[str, float]) -> dict[str, Value]:
    """Return the medians of the rounds and their largest values, and whether they keep the bars."""
    values = {}
    for name in rounds[0]:
        found = [each[name] for each in rounds]
        median, bar = statistics.median(found), bars.get(name)
        values[name] = Value(
            median, "s" if name.endswith("_s") else "1", hi=max(found),
            bar=None if bar is None else f"≤ {bar:g}", passed=None if bar is None else median <= bar,
        )  # fmt: skip
    return values | {"rounds": Value(len(rounds), "rounds")}


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add the options of the load."""
    parser.add_argument("--size", default="1B", choices=SIZES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--client-prompt", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=24_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="time of decoding before the long prompt")
    parser.add_argument("--rounds", type=int, default=2)


PREAMBLE, TURNS, RESULT, ANSWER = 3000, 20, 150, 32
"""Tokens of an agent's preamble, its turns, and tokens of a tool's result and of an answer."""


def agents(loop: EngineLoop, rng: random.Random, n_agents: int) -> tuple[float, float]:
    """Let agents take their turns. Return the least share that was cached for an agent, and that for all."""
    vocab = loop.engine.model.config.vocab_size
    draw = lambda n: [rng.randrange(vocab) for _ in range(n)]  # noqa: E731
    dialogs = [draw(PREAMBLE) for _ in range(n_agents)]
    cached, read = [0] * n_agents, [0] * n_agents
    for turn in range(TURNS):
        sampling = Sampling(max_tokens=ANSWER)
        running = [
            loop.submit(Request(list(ids), sampling, owner=f"agent {n}"))[0] for n, ids in enumerate(dialogs)
        ]
        for n, generation in enumerate(running):
            dialogs[n] += [id_ for delta in generation for id_ in delta.token_ids] + draw(RESULT)
            if turn:
                cached[n] += generation.usage.cached_tokens
                read[n] += generation.usage.prompt_tokens
    return min(c / r for c, r in zip(cached, read, strict=True)), sum(cached) / sum(read)


def main() -> None:
    """Parse and measure."""
    parser = bench_parser(__doc__)
    add_load(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agents", action="store_true", help="three agents instead of a long prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = SIZES[args.size].replace(n_layers=args.layers)
    model = random_quantized(config, scheme(args.quant), args.seed)
    rng = random.Random(args.seed)
    with EngineLoop(Engine(model, None, max_context=args.context)) as loop:
        if args.agents:
            least, share = agents(loop, rng, 3)
            save_receipt(
                "serve-turns", seed=args.seed,
                what=f"three agents take {TURNS} turns each at the same time: {args.size} shape with {args.layers} layers",
                values={
                    "cached, of the prompts after the first": at_least(0.9, share, "1"),
                    "the same, the worst agent": Value(least, "1"),
                },
            )  # fmt: skip
            return

        def ask(n_tokens: int, n_new: int, owner: str) -> Client:
            prompt = [rng.randrange(config.vocab_size) for _ in range(n_tokens)]
            return EngineClient(loop.submit(Request(prompt, Sampling(max_tokens=n_new), owner=owner))[0])

        ask(min(2000, args.prompt), 20, "warm up").join()
        rounds = [one_round(ask, args) for _ in range(args.rounds)]
    save_receipt(
        "serve-fairness",
        what=f"{args.clients} clients decode while a prompt of {args.prompt:,} tokens arrives: {args.size} shape "
        f"with {args.layers} layers, {args.quant}, {args.threads} threads",
        values=figures(rounds, {"slower": SLOWER, "later": LATER}),
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
