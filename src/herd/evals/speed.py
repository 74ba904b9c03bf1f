"""Measure prefill and decode on this machine, compared with the speed of its memory.

Everything goes through the engine's public interface, so the times include scheduler, cache, sampling and
Python. A round measures Herd, then the memory, then llama.cpp. Ratios are computed within a round, so that
other work on the machine slows all of them alike. Medians are reported.

A decode step reads all weights once (except unused rows of the embedding) and all cached keys and values. So
the bytes read per second are a bandwidth, and their fraction of the bandwidth measured in the same rounds
shows how much could still be gained.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.engine import Engine, ResponseStream
from ..engine.memory import nbytes
from ..engine.request import Request, Sampling
from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant.formats import BF16, F16, F32, Scheme
from ..quant.linear import QuantEmbedding, QuantLinear
from ..quant.random import random_quantized
from .rival import LlamaCpp

Turn = Callable[[], float]
"""A function that does some work and returns its seconds (or another number)."""
AHEAD = 32
"""Tokens that the first sequences may generate while the last prompts are still in prefill."""
_PLAIN = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


@dataclass(frozen=True)
class Work:
    """Work to measure: prefill of ``batch`` prompts of ``tokens`` tokens, or a decode step at this length."""

    kind: str
    tokens: int
    batch: int = 1

    @property
    def n_tokens(self) -> int:
        """Tokens that one turn processes or generates."""
        return self.batch * (self.tokens if self.kind == "prefill" else 1)

    def __str__(self) -> str:
        where = f"prefill of {self.tokens}" if self.kind == "prefill" else f"decode at {self.tokens}"
        return where if self.batch == 1 else f"{where}, {self.batch} at once"

    def flops(self, config: ModelConfig) -> float:
        """Return the operations of a turn (a multiply-add is two).

        The head is applied only to a prompt's last token.
        """
        if self.kind == "decode":
            return self.batch * config.flops_per_token(self.tokens)
        head = 2.0 * config.dim * config.vocab_size
        return self.batch * (self.tokens * (config.flops_per_token(self.tokens / 2) - head) + head)


class Runner:
    """An engine that runs the measured work.

    Prompts are random and never repeated, so that the prefix cache cannot help.
    """

    def __init__(self, model: LlamaLM, *, context: int, batch: int, kv: str = "auto", seed: int = 0) -> None:
        """Make an engine for ``batch`` sequences of at most ``context`` tokens. ``kv`` is as in `Engine`."""
        room = nbytes(model.config, batch, context, BYTES["fp32"])
        self.engine = Engine(model, None, max_batch=batch, max_context=context, cache_bytes=room, kv=kv)
        self._generator = torch.Generator().manual_seed(seed)
        self._streams: list[ResponseStream] = []

    def prefill(self, work: Work) -> float:
        """Return the seconds from submitting the prompts to the first token of the last one."""
        start = time.perf_counter()
        streams = self._submit(work, max_tokens=1)
        for stream in streams:
            next(stream)
        return time.perf_counter() - start

    def start(self, work: Work, steps: int) -> None:
        """Prefill the prompts. `steps` then continues them by at most ``steps`` tokens."""
        self.stop()
        self._streams = self._submit(work, max_tokens=steps + AHEAD)
        self._step()

    def steps(self, n: int) -> list[float]:
        """Return the seconds of each of ``n`` steps."""
        return [self._step() for _ in range(n)]

    def stop(self) -> None:
        """Cancel the sequences of `start`."""
        for stream in self._streams:
            stream.cancel()
        self._streams = []

    def _submit(self, work: Work, max_tokens: int) -> list[ResponseStream]:
        vocab = self.engine.model.config.vocab_size
        prompts = torch.randint(vocab, (work.batch, work.tokens), generator=self._generator).tolist()
        return [
            self.engine.submit(Request(p, Sampling(max_tokens=max_tokens, temperature=0))) for p in prompts
        ]

    def _step(self) -> float:
        """Take the next token of every stream. The first stream without one makes the engine step for all."""
        start = time.perf_counter()
        for stream in self._streams:
            next(stream)
        return time.perf_counter() - start


def alternate(
    turns: Mapping[str, Turn], rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[float]]:
    """Return the results of every turn in ``rounds`` rounds, after a warm-up round that does not count."""
    out: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(rounds + 1):
        for place, (name, turn) in enumerate(turns.items()):
            value = turn()
            if round_:
                out[name].append(value)
            if progress:
                progress(round_ * len(turns) + place + 1, (rounds + 1) * len(turns))
    return out


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Return (median, lower quartile, upper quartile) of theirs / ours per round. Above 1, ours is faster."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def weights_read(model: LlamaLM) -> int:
    """Return the bytes of weights that a decode step reads: all but the embedding."""
    total = 0
    for name, module in model.named_modules():
        if name == "model.embed_tokens":
            continue  # a tied head is counted as the head
        if isinstance(module, QuantLinear):
            blocks = module.out_features * module.in_features // module.format.block
            total += blocks * module.format.block_bytes
        elif not isinstance(module, QuantEmbedding):
            total += sum(p.nbytes for p in module.parameters(recurse=False))
    return total


def cache_read(config: ModelConfig, kind: str, context: int) -> int:
    """Return the bytes of keys and values in a cache of ``kind`` that a step of one sequence reads."""
    return context * config.kv_nbytes_per_token(BYTES[kind])


def scheme_of(model: LlamaLM) -> Scheme:
    """Return the formats of a model's weights, judged by its first layer."""
    parts = map(model.get_submodule, ("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head"))
    formats = [
        p.format if isinstance(p, QuantLinear | QuantEmbedding) else _PLAIN[p.weight.dtype]  # type: ignore
        for p in parts
    ]
    return Scheme(*formats)


def overhead_seconds(
    config: ModelConfig, plan: Scheme, dtype: torch.dtype, batch: int, steps: int = 20
) -> float:
    """Return the seconds of a decode step with layers so narrow that computation takes almost no time.

    It is an upper bound of the time between kernels, because a little computation remains.
    """
    narrow = config.replace(dim=256, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=256, vocab_size=256)
    runner = Runner(random_quantized(narrow, plan, dtype=dtype), context=steps + AHEAD + 8, batch=batch)
    runner.start(Work("decode", 4, batch), steps + 2)
    runner.steps(2)
    return statistics.median(runner.steps(steps))


def measure_speed(
    model: LlamaLM, works: list[Work], *, rounds: int = 5, steps: int = 8, bandwidth: Turn | None = None,
    rival: LlamaCpp | None = None, progress: Callable[[str, int, int], None] | None = None, kv: str = "auto",
    seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a record with the medians for each work.

    ``bandwidth`` measures the memory's bytes per second.

    A decode turn is the median of ``steps`` steps. Sequences grow by these steps, both Herd's and
    llama.cpp's.
    """
    longest = longest_sequence(works, rounds, steps)
    runner = Runner(model, context=longest, batch=max(work.batch for work in works), kv=kv, seed=seed)
    records = []
    for work in works:
        turns = _turns(work, runner, rival, rounds, steps)
        if bandwidth is not None and work.kind == "decode":
            turns["bandwidth"] = bandwidth
        times = alternate(turns, rounds, progress and functools.partial(progress, str(work)))
        runner.stop()
        records.append(_record(runner.engine, work, times, steps, rounds))
    return records


def longest_sequence(works: list[Work], rounds: int, steps: int) -> int:
    """Return the length in tokens of the longest sequence in `measure_speed`."""
    growth = (rounds + 1) * steps + AHEAD
    return 1 + max(work.tokens + (growth if work.kind == "decode" else 0) for work in works)


def _turns(work: Work, runner: Runner, rival: LlamaCpp | None, rounds: int, steps: int) -> dict[str, Turn]:
    if work.kind == "prefill":
        turns: dict[str, Turn] = {"herd": lambda: runner.prefill(work)}
        return turns if rival is None else turns | {"rival": lambda: rival.prefill(work.tokens)}
    runner.start(work, (rounds + 1) * steps)
    turns = {"herd": lambda: statistics.median(runner.steps(steps))}
    if rival is None:
        return turns
    rival.start(work.tokens, work.batch)
    return turns | {"rival": lambda: statistics.median(rival.steps(steps))}


def _record(
    engine: Engine, work: Work, times: dict[str, list[float]], steps: int, rounds: int
) -> dict[str, Any]:
    model, kind = engine.model, engine.cache.kind
    seconds = statistics.median(times["herd"])
    record: dict[str, Any] = {
        "name": str(work), "work": work.kind, "tokens": work.tokens, "batch": work.batch, "rounds": rounds,
        "seconds": seconds, "tokens_per_second": work.n_tokens / seconds,
        "gops": work.flops(model.config) / seconds / 1e9,
    }  # fmt: skip
    if work.kind == "decode":
        middle = work.tokens + (rounds + 1) * steps // 2  # because the sequences grow during the measurement
        read = weights_read(model) + work.batch * cache_read(model.config, kind, middle)
        record |= {"kv": kind, "nbytes": read, "bytes_per_second": read / seconds}
    if "bandwidth" in times:
        shares = [record["nbytes"] / t / b for t, b in zip(times["herd"], times["bandwidth"], strict=True)]
        record["read_bandwidth"] = statistics.median(times["bandwidth"])
        record["share_of_bandwidth"] = statistics.median(shares)
    if "rival" in times:
        ratio, low, high = paired(times["herd"], times["rival"])
        theirs = statistics.median(times["rival"])
        record["rival"] = {
            "seconds": theirs, "tokens_per_second": work.n_tokens / theirs, "ratio": ratio,
            "ratio_quartiles": [low, high],
        }  # fmt: skip
        if work.kind == "decode":
            record["rival"]["bytes_per_second"] = record["nbytes"] / theirs
    return record
