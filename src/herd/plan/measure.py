"""Measure this machine with torch, in about 30 s. The result is a `profile.Profile`.

Every operator is timed as a model would use it. Matmuls alternate between enough matrices (`COLD` bytes)
that none stays in a cache, because a forward pass uses each matrix once. Attention has a realistic length. A
tiny model gives the time between operators. Each number is the median of several passes.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from ..dtypes import torch_dtype
from ..engine.cache import PagedCache
from ..engine.runner import ModelRunner
from ..kernels.bandwidth import MemoryReader
from ..kernels.page_layout import BYTES, PAGE, head_bytes
from ..kernels.paged_attention import Ragged, paged_attention
from ..kernels.pointwise import swiglu
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..machine import cache_folder, cores, resident_memory
from ..quant.blocks import encode
from ..quant.formats import FORMATS, scheme
from ..quant.linear import QuantLinear, swap_linears
from ..quant.random import random_rows
from ..report import receipt
from .profile import SHORT_NAMES, Gpu, Profile, machine_key

COLD = 256 << 20
"""Total bytes of the alternating matrices: several times a last-level cache."""
INNER, OUTER = 4096, 14336
"""Shape of the measured matrix: an FFN matrix of 8B. Most of a model's weights are in the FFN."""
ROWS = (1, 4, 16, 64, 512)
PLAIN = ("fp32", "bf16")
FORMAT_NAMES = {short: name for name, short in SHORT_NAMES.items()}
DISK_BYTES = 256 << 20
HEADS = (32, 8, 128)
"""Query heads, KV heads and head dim of the measured attention, as in 8B."""


def seconds_of(work: Callable[[], object], budget: float = 0.2, least: int = 3) -> float:
    """Return the median seconds of ``work``, repeated for about ``budget`` seconds after one warm-up run.

    Work that takes more than twice the budget is timed only once, because on so slow a machine more precision
    is not worth the wait.
    """
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
def measure_machine(on_step: Callable[[str], None] = lambda what: None) -> Profile:
    """Measure everything. ``on_step`` is called with the name of each measurement."""
    began, base = time.perf_counter(), resident_memory()
    where = receipt.describe_machine()
    on_step("memory")
    bandwidth = bandwidths()
    gemm: dict[str, dict[int, float]] = {}
    for name in (*PLAIN, *FORMAT_NAMES):
        on_step(f"matmul, {name}")
        gemm[name] = matmul_rates(name, linears(name), ROWS)
    on_step("attention")
    prefill = {kind: attention_prefill(kind) for kind in BYTES}
    decode = {kind: attention_decode(kind) for kind in BYTES}
    on_step("between operators")
    pointwise, between = pointwise_bandwidth(), between_operators()
    on_step("quantizing")
    encode_rates = {name: encode_rate(name) for name in FORMAT_NAMES}
    hashing, hashing_all = hash_rates()
    on_step("disk")
    disk, disk_write = disk_bandwidths(cache_folder())
    if torch.cuda.is_available():
        on_step("GPUs")
    return Profile(
        key=machine_key(),
        date=receipt.utc_now(),
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
        encode=encode_rates,
        hash=hashing,
        hash_all=hashing_all,
        disk=disk,
        disk_write=disk_write,
        base=base,
        seconds=time.perf_counter() - began,
        gpus=tuple(measured_gpus()),
    )


def bandwidths(all_counts: bool = True) -> dict[int, float]:
    """Return the bytes/s read by all threads and, with ``all_counts``, also by 1, 2, 4, … threads."""
    most, reader = torch.get_num_threads(), MemoryReader(COLD * 2)
    fewer = {1 << power for power in range(most.bit_length())} if all_counts else set()
    found = {}
    try:
        for threads in sorted(fewer | {most}):
            torch.set_num_threads(threads)
            reader.measure(0)
            found[threads] = reader.measure(0.3)
    finally:
        torch.set_num_threads(most)
    return found


def linears(name: str) -> list[nn.Module]:
    """Return linear layers of one weight format that together take `COLD` bytes."""
    if name not in PLAIN:
        format = FORMATS[FORMAT_NAMES[name]]
        count = max(1, round(COLD / (INNER * OUTER * format.bits / 8)))
        return [QuantLinear(random_rows((OUTER, INNER), format, seed), format) for seed in range(count)]
    dtype = torch_dtype(name)
    layers: list[nn.Module] = []
    for _ in range(max(1, round(COLD / (INNER * OUTER * dtype.itemsize)))):
        layer = nn.Linear(INNER, OUTER, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
        layer.weight.data.uniform_(-0.01, 0.01)
        layers.append(layer)
    return layers


def matmul_rates(name: str, layers: Sequence[nn.Module], rows: Sequence[int]) -> dict[int, float]:
    """Return the operations/s of a matmul with these layers (from `linears`), by the number of rows."""
    dtype, found = torch_dtype(name) if name in PLAIN else torch.float32, {}
    for n in rows:
        x_ND, turns = torch.randn(n, INNER).to(dtype), itertools.cycle(layers)
        seconds = seconds_of(lambda x=x_ND, turns=turns: next(turns)(x))  # type: ignore[misc]
        found[n] = 2.0 * n * INNER * OUTER / seconds
    return found


def attention_seconds(kind: str, cached: int, tokens: int, layers: int = 1) -> float:
    """Return the seconds of attention in ``layers`` layers, for new tokens after ``cached`` ones."""
    H, G, K = HEADS
    n = -(-(cached + tokens) // PAGE)
    pool = torch.empty(n, layers, G, head_bytes(kind, K), dtype=torch.uint8)
    # Unwritten pages are not in physical memory. As floats of any length these bytes are about 0.01 or
    # 1: denormal numbers take some processors a hundred times as long.
    pool.fill_(0x3C)
    parts = torch.tensor([[0, 0, tokens, cached]])
    ragged = Ragged(torch.arange(n, dtype=torch.int32)[None], parts, pool.device)
    q, k, v = (torch.randn(tokens, heads, K) for heads in (H, G, G))

    def work() -> None:
        for layer in range(layers):
            paged_attention(q, k, v, pool, ragged, layer)

    return seconds_of(work, 0.3)


def attention_prefill(kind: str, cached: int = 512, tokens: int = 1024) -> float:
    """Return the operations/s of attention for a chunk of a prompt. Masked operations do not count."""
    H, _, K = HEADS
    return 4 * tokens * (cached + tokens / 2) * H * K / attention_seconds(kind, cached, tokens)


def attention_decode(kind: str, context: int = 4096) -> float:
    """Return the bytes/s of keys and values in a decode step, with more layers than a CPU cache can store."""
    _, G, K = HEADS
    layer = 2 * G * K * context * BYTES[kind]
    layers = max(1, round(COLD / layer))
    return layers * layer / attention_seconds(kind, context - 1, 1, layers)


def pointwise_bandwidth() -> float:
    """Return the bytes/s of SwiGLU on tensors larger than the caches. It reads two and writes one."""
    gate, up = (torch.randn(1024, OUTER) for _ in range(2))
    return 3 * gate.nbytes / seconds_of(lambda: swiglu(gate, up), 0.3)


def between_operators() -> dict[str, float]:
    """Return the seconds between the operators of one layer, with plain and with packed weights.

    This is the difference between 8 layers and 4 layers of a tiny model.
    """
    config = ModelConfig(256, 64, 4, 4, 2, 128, max_context=128)

    def step_seconds(layers: int, packed: bool) -> float:
        model = LlamaLM(config.replace(n_layers=layers)).init_weights(0)
        if packed:
            model = swap_linears(model, scheme("q8"))
        cache = PagedCache(model.config, "bf16", 1 << 20)
        runner, row = ModelRunner(model, cache), cache.open()

        def step() -> None:
            cache.grow(row, 1)
            runner([(row, 1)], [0])
            cache.truncate(row, 0)

        with torch.inference_mode():
            return seconds_of(step, 0.2, 50)

    return {
        name: max(0.0, (step_seconds(8, packed) - step_seconds(4, packed)) / 4)
        for name, packed in (("plain", False), ("packed", True))
    }


def encode_rate(name: str) -> float:
    """Return the number of bf16 weights per second that are rounded to blocks of this format."""
    weight = torch.randn(1024, INNER).bfloat16()
    return weight.numel() / seconds_of(lambda: encode(weight, FORMATS[FORMAT_NAMES[name]], "weight"))


def hash_rates() -> tuple[float, float]:
    """Return the bytes/s of SHA-256 (the hash of weights) on one thread and on all cores."""
    block, threads = bytes(16 << 20), cores()

    def digest(_: int) -> bytes:
        return hashlib.sha256(block).digest()

    with ThreadPoolExecutor(threads) as pool:
        one = seconds_of(lambda: digest(0), 0.05)
        every = seconds_of(lambda: list(pool.map(digest, range(threads))), 0.05)
    return len(block) / one, threads * len(block) / every


def disk_bandwidths(folder: Path) -> tuple[float | None, float | None]:
    """Return the bytes/s read from the disk of ``folder`` (past the page cache) and written to it.

    None for reading if the system has no direct reads. None for both if the disk is full.
    """
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
                buffer = mmap.mmap(-1, 8 << 20)  # aligned to a page, as direct reads require
                start, total = time.perf_counter(), 0
                while count := os.readv(handle, [buffer]):
                    total += count
                return total / (time.perf_counter() - start), written
            finally:
                os.close(handle)
    except OSError:
        return None, None


def measured_gpus() -> Iterator[Gpu]:
    """Measure every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        with torch.cuda.device(index):
            properties = torch.cuda.get_device_properties(index)
            words = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
            a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            product = _cuda_seconds(torch.mm, a, b)
            copy = _cuda_seconds(torch.empty_like(words).copy_, words)
            peer = None
            if count > 1:
                there = torch.empty_like(words, device=f"cuda:{(index + 1) % count}")
                peer = words.nbytes / _cuda_seconds(there.copy_, words)
            rates = (2 * words.nbytes / copy, 2 * 8192**3 / product, peer)
            yield Gpu(properties.name, properties.total_memory, *rates)


def _cuda_seconds(work: Callable[..., object], *arguments: torch.Tensor) -> float:
    def synchronized() -> None:
        work(*arguments)
        torch.cuda.synchronize()

    return seconds_of(synchronized, 0.2, 5)
