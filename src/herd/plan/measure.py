"""Measuring this machine: half a minute, with torch. What comes out is a `profile.Profile`.

Every operator is timed as a model would meet it: matmuls over enough matrices that none stays in a cache
between two passes (`COLD` bytes), because a forward pass meets each matrix once; attention at a real length;
a block of a tiny model for what lies between operators. Each number is the median of several passes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from ..engine.cache import PagedCache
from ..engine.runner import ModelRunner
from ..kernels.bandwidth import MemoryReader
from ..kernels.page_layout import BYTES, PAGE, head_bytes
from ..kernels.paged_attention import Ragged, paged_attention
from ..kernels.pointwise import swiglu
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant.blocks import encode
from ..quant.formats import FORMATS, Format, scheme
from ..quant.linear import QuantLinear, swap_linears
from ..quant.random import random_rows
from ..report import receipt
from .profile import Gpu, Profile, cache_folder, key, now

COLD = 256 << 20
"""Bytes of matrices passed through in turn: several last-level caches."""
INNER, OUTER = 4096, 14336
"""The matrix that is multiplied by: of the FFN of 8B, where most of a model's weights are."""
ROWS = (1, 4, 16, 64, 512)
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMAT_NAMES = {"q8": "Q8_0", "q4": "Q4_0", "q4k": "Q4_K"}
DISK_BYTES = 256 << 20
HEADS = (32, 8, 128)
"""Query heads, KV heads and their dim of the attention that is measured: those of 8B."""

Step = Callable[[str], None]


def seconds_of(work: Callable[[], object], budget: float = 0.2, least: int = 3) -> float:
    """Median seconds of one ``work`` over about ``budget`` seconds, after one that does not count. What takes
    longer than twice the budget is timed once: on a machine that slow, one more digit is not worth the
    wait."""
    start = time.perf_counter()
    work()
    first = time.perf_counter() - start
    if first > 2 * budget:
        return first
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def measure(step: Step = lambda what: None) -> Profile:
    """Measure everything; ``step`` hears what is being measured."""
    began, base = time.perf_counter(), psutil.Process().memory_info().rss
    where = receipt.describe_machine()
    step("memory")
    bandwidth = bandwidths()
    gemm: dict[str, dict[int, float]] = {}
    for name in (*PLAIN, *FORMAT_NAMES):
        step(f"matmul, {name}")
        gemm[name] = gemm_rates(name)
    step("attention")
    prefill = {kind: attention_prefill(kind) for kind in BYTES}
    decode = {kind: attention_decode(kind) for kind in BYTES}
    step("between operators")
    pointwise, between = pointwise_bandwidth(), between_operators()
    step("quantizing")
    encode = {name: encode_rate(name) for name in FORMAT_NAMES}
    hashing, hashing_all = hash_rates()
    step("disk")
    disk, disk_write = disk_bandwidths(cache_folder())
    if torch.cuda.is_available():
        step("GPUs")
    return Profile(
        key=key(),
        date=now(),
        cpu=where["cpu"],
        cores=where["cores"],
        isa=tuple(where["isa"]),
        memory=where["memory_bytes"] or 0,
        threads=torch.get_num_threads(),
        bandwidth=bandwidth,
        gemm=gemm,
        attention_prefill=prefill,
        attention_decode=decode,
        pointwise=pointwise,
        between=between,
        encode=encode,
        hash=hashing,
        hash_all=hashing_all,
        disk=disk,
        disk_write=disk_write,
        base=base,
        seconds=time.perf_counter() - began,
        gpus=tuple(gpus()),
    )


def bandwidths(all_counts: bool = True) -> dict[int, float]:
    """Bytes/s read from memory by all threads, and with ``all_counts`` by 1, 2, 4 ... of them as well."""
    most, reader = torch.get_num_threads(), MemoryReader(COLD * 2)
    fewer = {1 << power for power in range(most.bit_length()) if 1 << power <= most} if all_counts else set()
    counts = sorted(fewer | {most})
    found = {}
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            reader.measure(0)
            found[threads] = reader.measure(0.3)
    finally:
        torch.set_num_threads(most)
    return found


def linears(name: str, inner: int = INNER, outer: int = OUTER, cold: int = COLD) -> list[nn.Module]:
    """Layers of one format and shape, as many as fill ``cold`` bytes."""
    if name in PLAIN:
        dtype = PLAIN[name]
        count = max(1, round(cold / (inner * outer * dtype.itemsize)))
        layers: list[nn.Module] = []
        for _ in range(count):
            layer = nn.Linear(inner, outer, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
            layer.weight.data.uniform_(-0.01, 0.01)
            layers.append(layer)
        return layers
    format: Format = FORMATS[FORMAT_NAMES[name]]
    count = max(1, round(cold / (inner * outer * format.bits / 8)))
    return [QuantLinear(random_rows((outer, inner), format, seed), format) for seed in range(count)]


def gemm_rates(name: str) -> dict[int, float]:
    """Operations/s of a matmul with weights in this format that are not in a cache, by rows."""
    return rates_of(name, linears(name), ROWS)


def rates_of(
    name: str, layers: list[nn.Module], rows: tuple[int, ...], budget: float = 0.2
) -> dict[int, float]:
    """The same of layers that are there already, all of `linears`' shape."""
    dtype, found = PLAIN.get(name, torch.float32), {}
    for n in rows:
        x_ND, turn = torch.randn(n, INNER).to(dtype), _in_turn(layers)
        found[n] = 2.0 * n * INNER * OUTER / seconds_of(lambda x=x_ND, turn=turn: next(turn)(x), budget)  # type: ignore[misc]
    return found


def attention_seconds(kind: str, cached: int, tokens: int, layers: int = 1) -> float:
    """Seconds of attention in ``layers`` layers for ``tokens`` new tokens behind ``cached`` ones, on a paged
    cache."""
    H, G, K = HEADS
    n = -(-(cached + tokens) // PAGE)
    pool = torch.empty(n, layers, G, head_bytes(kind, K), dtype=torch.uint8).fill_(
        1
    )  # written: pages are real memory
    ragged = Ragged(
        torch.arange(n, dtype=torch.int32)[None], torch.tensor([[0, 0, tokens, cached]]), pool.device
    )
    q, k, v = torch.randn(tokens, H, K), torch.randn(tokens, G, K), torch.randn(tokens, G, K)

    def work() -> None:
        for layer in range(layers):
            paged_attention(q, k, v, pool, ragged, layer)

    return seconds_of(work, 0.3)


def attention_prefill(kind: str, cached: int = 512, tokens: int = 1024) -> float:
    """Operations/s of a piece of a prompt, of the places that count."""
    H, _, K = HEADS
    return 4 * tokens * (cached + tokens / 2) * H * K / attention_seconds(kind, cached, tokens)


def attention_decode(kind: str, context: int = 4096) -> float:
    """Bytes/s of keys and values in a decode step, over layers enough to be cold."""
    _, G, K = HEADS
    layer = 2 * G * K * context * BYTES[kind]
    layers = max(1, round(COLD / layer))
    return layers * layer / attention_seconds(kind, context - 1, 1, layers)


def pointwise_bandwidth() -> float:
    """Bytes/s of SwiGLU over tensors beyond the caches: two read, one written."""
    gate, up = (torch.randn(1024, OUTER) for _ in range(2))
    return 3 * gate.nbytes / seconds_of(lambda: swiglu(gate, up), 0.3)


def between_operators() -> dict[str, float]:
    """Seconds of one block in a decode step when its arithmetic is next to nothing, with plain and with
    packed weights: the difference between 8 layers and 4 of a tiny model."""
    config = ModelConfig(256, 64, 4, 4, 2, 128, max_context=128)

    def step_of(layers: int, packed: bool) -> float:
        model = LlamaLM(config.replace(n_layers=layers)).init_weights(0)
        if packed:
            model = swap_linears(model, scheme("q8"))
        cache = PagedCache(model.config, "bf16", 1 << 20)
        trunk, row = ModelRunner(model, cache), cache.open()

        def step() -> None:
            cache.grow(row, 1)
            trunk([(row, 1)], [0])
            cache.truncate(row, 0)

        with torch.inference_mode():
            return seconds_of(step, 0.2, 50)

    kinds = {"plain": False, "packed": True}
    return {name: max(0.0, (step_of(8, packed) - step_of(4, packed)) / 4) for name, packed in kinds.items()}


def encode_rate(name: str) -> float:
    """Weights/s in bf16 that are rounded to blocks."""
    weight = torch.randn(1024, INNER).bfloat16()
    return weight.numel() / seconds_of(lambda: encode(weight, FORMATS[FORMAT_NAMES[name]], "weight"), 0.2)


def hash_rates() -> tuple[float, float]:
    """Bytes/s of SHA-256, in which checkpoints name their weights: on one thread, and on all."""
    block, threads = bytes(16 << 20), os.cpu_count() or 1

    def digest(_: int) -> bytes:
        return hashlib.sha256(block).digest()

    with ThreadPoolExecutor(threads) as pool:
        one = seconds_of(lambda: digest(0), 0.05)
        every = seconds_of(lambda: list(pool.map(digest, range(threads))), 0.05)
    return len(block) / one, threads * len(block) / every


def disk_bandwidths(folder: Path) -> tuple[float | None, float | None]:
    """Bytes/s read from the disk of ``folder`` past the page cache, and written to it; None where the system
    offers no direct reads or has no room."""
    direct = getattr(os, "O_DIRECT", None)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-") as file:
            chunk, start = os.urandom(1 << 20), time.perf_counter()
            for _ in range(DISK_BYTES >> 20):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            written = DISK_BYTES / (time.perf_counter() - start)
            if direct is None:
                return None, written
            handle = os.open(file.name, os.O_RDONLY | direct)
            try:
                buffer = mmap.mmap(-1, 8 << 20)  # aligned to a page, as direct reads want
                start, total = time.perf_counter(), 0
                while count := os.readv(handle, [buffer]):
                    total += count
                return total / (time.perf_counter() - start), written
            finally:
                os.close(handle)
    except OSError:
        return None, None


def gpus() -> Iterator[Gpu]:
    """Every CUDA device, measured; nothing where there is none."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(index):
            properties = torch.cuda.get_device_properties(index)
            words = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
            other = torch.empty_like(words)
            a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            copy = _cuda_seconds(lambda: other.copy_(words))  # noqa: B023
            product = _cuda_seconds(lambda: a @ b)  # noqa: B023
            peer = None
            if torch.cuda.device_count() > 1:
                there = torch.empty_like(words, device=f"cuda:{(index + 1) % torch.cuda.device_count()}")
                peer = words.nbytes / _cuda_seconds(lambda: there.copy_(words))  # noqa: B023
            yield Gpu(
                properties.name, properties.total_memory, 2 * words.nbytes / copy, 2 * 8192**3 / product, peer
            )


def _cuda_seconds(work: Callable[[], object]) -> float:
    def synced() -> None:
        work()
        torch.cuda.synchronize()

    return seconds_of(synced, 0.2, 5)


def _in_turn(layers: list[nn.Module]) -> Iterator[Callable[[Tensor], Tensor]]:
    while True:
        yield from layers
