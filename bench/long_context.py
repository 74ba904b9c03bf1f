"""Decode with an 8B model in 4 bits after 131,072 tokens in an int8 cache, in the predicted memory.

    python bench/long_context.py                   # two minutes on two cores, 15 GB of memory

Every page of the cache is filled with seeded synthetic keys and values. Then the last tokens up to the
model's context are decoded, each of which reads the whole cache. Bytes are compared with the planner's
formulas: tensors with `Scheme.nbytes` and `engine.memory.nbytes`, and the growth of the process's peak memory
with their sum.
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
import psutil
import torch

from common import at_most, bench_parser, exactly, save_receipt
from herd.engine.cache import PagedCache
from herd.engine.memory import nbytes
from herd.evals.speed import cache_read, weights_read
from herd.kernels.bandwidth import MemoryReader, read_all
from herd.kernels.page_layout import BLOCK, BYTES, PAGE
from herd.llama.config import SIZES
from herd.quant import scheme
from herd.quant.random import random_quantized
from herd.report.receipt import Value

SEED = 0
SCALE_BITS = 0x3C00
"""bf16 of 2^-7: with codes of up to 127, keys and values of about 1."""


def fill(cache: PagedCache) -> None:
    """Random codes in every page, scales of 1/128 to 1/64."""
    c = cache.config
    codes, scales = PAGE * c.head_dim, PAGE * c.head_dim // BLOCK * 2
    generator = np.random.Generator(np.random.SFC64(SEED))
    pool = cache.pool
    for page in range(cache.pages.touched):
        words = generator.integers(-(2**63), 2**63, pool[page].numel() // 8, dtype=np.int64)
        pool[page] = torch.from_numpy(words).view(torch.uint8).view(pool[page].shape)
    for start in (codes, 2 * codes + scales):
        bits = pool[: cache.pages.touched, ..., start : start + scales].view(torch.int16)
        bits &= 0x7F
        bits |= SCALE_BITS


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--size", default="8B", choices=list(SIZES))
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--context", type=int)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    config, plan = SIZES[args.size], scheme(args.quant)
    context = args.context or config.max_context
    torch.ones(8) @ torch.ones(8)
    read_all(torch.ones(64, dtype=torch.int64))  # libraries are there before memory is counted
    before = psutil.Process().memory_info().rss
    model = random_quantized(config, plan, SEED)
    expected = {"weights": plan.nbytes(config), "cache": nbytes(config, 1, context, BYTES["int8"])}
    cache = PagedCache(config, "int8", expected["cache"], context)
    sequence = cache.open()
    cache.grow(sequence, context)
    fill(cache)
    sequence.length = context - args.steps
    seconds, token = [], 1
    with torch.inference_mode():
        for _ in range(args.steps):
            start = time.perf_counter()
            positions, attend = cache.step([(sequence, 1)])
            logits = model.lm_head(model(torch.tensor([[token]]), positions, attend))
            token = int(logits[0, -1].argmax())
            seconds.append(time.perf_counter() - start)
            assert bool(torch.isfinite(logits).all())
    assert sequence.length == context
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    held = parameters + cache.nbytes
    reader = MemoryReader()
    reader.measure(0)
    bandwidth, step = reader.measure(1.0), statistics.median(seconds[1:])
    nbytes_read = weights_read(model) + cache_read(config, "int8", context)
    total = sum(expected.values())
    values = {
        "tokens in the cache": exactly(config.max_context, context, "tokens"),
        "decode": Value(1 / step, "tokens/s"),
        "time per token": Value(step, "s"),
        "bytes read per token": Value(nbytes_read, "bytes"),
        "memory read at": Value(nbytes_read / step / 1e9, "GB/s"),
        "share of read bandwidth": Value(nbytes_read / step / bandwidth, "1"),
        "bytes of weights": Value(parameters, "bytes"),
        "bytes of the cache": Value(cache.nbytes, "bytes"),
        "tensors over the formulas": Value(
            held / total, "×", bar="1 ± 0.02", passed=abs(held / total - 1) <= 0.02
        ),
        "peak memory": at_most(24 << 30, peak, "bytes", shown="≤ 24 GiB"),
        "peak over formulas and process": Value(
            peak / (total + before), "×", bar="1 ± 0.05", passed=abs(peak / (total + before) - 1) <= 0.05
        ),
    }
    save_receipt(
        "long-context",
        what=f"{args.size} shape, {plan.linears.name}, decoding behind {context:,} tokens of an int8 cache",
        values=values,
        seed=SEED,
        notes=f"{torch.get_num_threads()} threads; random weights, every page written with seeded keys and "
        f"values; median of {args.steps - 1} steps; the process held {before / 1e6:.0f} MB before",
    )


if __name__ == "__main__":
    main()
