"""Measure attention over the paged KV cache alone, at the width of an 8B model (receipt attention).

    python bench/attention.py [--kv fp32 bf16 int8] [--rounds 5]     # ten minutes on two cores

Prefill: a prompt of 8,192 or 32,768 tokens is attended to in pieces as the engine reads it. Two pieces, evenly
spread over the prompt, stand for all. Operations are 4 x heads x head dim for each pair of a query and a key that it
sees. They are compared with torch's matrix products, in fp32 and with AVX-512 also in bf16, of which the faster counts, and with torch's
own causal attention over 4,096 tokens. Decode: one token behind 32,768 or 131,072 others, in as many layers as make
the cache far larger than the processor's caches. Bytes of keys and values per second are compared with a loop that
only reads memory. All are measured in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common import at_least, bench_parser, save_receipt
from herd.engine.memory import PREFILL_TOKENS
from herd.evals.speed import alternate, paired
from herd.kernels.bandwidth import MemoryReader
from herd.kernels.large_pages import reserve
from herd.kernels.page_layout import PAGE, head_bytes
from herd.kernels.paged_attention import Ragged, paged_attention, write
from herd.report.receipt import Value

SEED = 0
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PROMPTS, CONTEXTS = (8192, 32768), (32768, 131072)
PIECES = 2
CACHE_BYTES = 512 << 20
"""Least bytes of keys and values that a decode turn reads."""
TORCH_TOKENS = 4096


def filled_pool(kind: str, tokens: int, layers: int) -> torch.Tensor:
    """A pool (pages, layers, KV heads, bytes) with random keys and values for ``tokens`` tokens."""
    pages, bytes_ = tokens // PAGE, head_bytes(kind, HEAD_DIM)
    pool = reserve(pages * layers * KV_HEADS * bytes_).view(pages, layers, KV_HEADS, bytes_)
    generator = torch.Generator().manual_seed(SEED)
    places = torch.arange(PAGE)
    for page in range(pages):
        k, v = torch.randn(2, PAGE, KV_HEADS, HEAD_DIM, generator=generator)
        write(pool, 0, torch.full((PAGE,), page), places, k, v)
    pool[:, 1:] = pool[:, :1]
    return pool


def attend(pool: torch.Tensor, position: int, n: int) -> Callable[[], None]:
    """A call that lets ``n`` tokens from ``position`` on attend to all tokens so far, in every layer."""
    q, k, v = (torch.randn(n, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    tables = torch.arange(len(pool), dtype=torch.int32)[None]
    ragged = Ragged(tables, torch.tensor([[0, 0, n, position]]), torch.device("cpu"))

    def call() -> None:
        for layer in range(pool.shape[1]):
            paged_attention(q, k, v, pool, ragged, layer)

    return call


def rate(amount: float, calls: list[Callable[[], object]]) -> Callable[[], float]:
    """A turn that makes all calls and returns their amount of work per second."""

    def turn() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return amount / (time.perf_counter() - start)

    return turn


def matrix_rate(dtype: torch.dtype) -> Callable[[], float]:
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    return rate(2 * 2048**3, [lambda: a @ b])


def torch_attention(dtype: torch.dtype) -> Callable[[], float]:
    q, k, v = (torch.randn(1, HEADS, TORCH_TOKENS, HEAD_DIM).to(dtype) for _ in range(3))
    operations = 4 * HEADS * HEAD_DIM * TORCH_TOKENS * (TORCH_TOKENS + 1) / 2
    return rate(operations, [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)])


def prefill(kind: str, tokens: int) -> Callable[[], float]:
    pool, pieces = filled_pool(kind, tokens, 1), tokens // PREFILL_TOKENS
    chosen = [int((i + 0.5) * pieces / PIECES) * PREFILL_TOKENS for i in range(PIECES)]
    pairs = sum(PREFILL_TOKENS * start + PREFILL_TOKENS * (PREFILL_TOKENS + 1) / 2 for start in chosen)
    return rate(4 * HEADS * HEAD_DIM * pairs, [attend(pool, start, PREFILL_TOKENS) for start in chosen])


def decode(kind: str, tokens: int) -> Callable[[], float]:
    nbytes = tokens // PAGE * KV_HEADS * head_bytes(kind, HEAD_DIM)
    layers = -(-CACHE_BYTES // nbytes)
    return rate(nbytes * layers, [attend(filled_pool(kind, tokens, layers), tokens - 1, 1)])


def compared(name: str, ours: list[float], limit: list[float], unit: str, bar: float) -> dict[str, Value]:
    share, low, high = paired(limit, ours)
    return {
        name: Value(statistics.median(ours) / 1e9, unit),
        f"{name}: share": at_least(bar, share, "1", low, high),
    }


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--kv", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    values: dict[str, Value] = {}
    dtypes = {"fp32": torch.float32}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # with AVX2, torch's bf16 products take a minute
        dtypes["bf16"] = torch.bfloat16
    for tokens in PROMPTS:
        turns = {f"matrix products, {name}": matrix_rate(dtype) for name, dtype in dtypes.items()}
        turns |= {f"torch's attention, {name}": torch_attention(dtype) for name, dtype in dtypes.items()}
        rates = alternate({kind: prefill(kind, tokens) for kind in args.kv} | turns, args.rounds)
        limit = max((rates[name] for name in list(turns)[: len(dtypes)]), key=statistics.median)
        for kind in args.kv:
            values |= compared(f"{kind}, prefill of {tokens}", rates[kind], limit, "GFLOP/s", 0.5)
        for name in turns:
            values[f"{name} (beside {tokens})"] = Value(statistics.median(rates[name]) / 1e9, "GFLOP/s")
        print({name: round(value.value, 3) for name, value in values.items()}, flush=True)
    reader = MemoryReader()
    for tokens in CONTEXTS:
        for kind in args.kv:
            rates = alternate({"herd": decode(kind, tokens), "read": reader.measure}, args.rounds)
            name = f"{kind}, decode behind {tokens}"
            values |= compared(name, rates["herd"], rates["read"], "GB/s", 0.7)
            values[f"{name}: read bandwidth"] = Value(statistics.median(rates["read"]) / 1e9, "GB/s")
            print({name: round(value.value, 3) for name, value in list(values.items())[-3:]}, flush=True)
    save_receipt(
        "attention",
        what="attention over the paged cache at 8B width, one layer at a time",
        values=values,
        seed=SEED,
        notes=f"{torch.get_num_threads()} threads; medians of {args.rounds} rounds, shares of paired rounds with their "
        f"quartiles; pieces of {PREFILL_TOKENS} tokens",
    )


if __name__ == "__main__":
    main()
