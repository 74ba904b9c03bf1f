"""Measure one CUDA device: memory, matrix products, decode, prefill, training, the loss.

    bash bench/gpu.sh                     # everything, unattended, at most eight minutes
    python bench/gpu.py STEP [--commit]   # one step: devices, tests, decode-bf16, ...

Each step runs in a process of its own under a time limit, writes one receipt (`gpu-STEP.json`) and may fail
alone. The summary at the end lists every step with its figure or its error. Weights are random and have the
shape of 8B unless a step says otherwise. Nothing is downloaded. Without a CUDA device the script says what it
skipped and ends.

Legend: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import bench_parser, save_receipt

ROOT = Path(__file__).parents[1]
SECONDS = 8 * 60
"""All steps together. A step that would start later is skipped."""

Figures = dict[str, tuple[float, str]]
"""Measured numbers by name, each with its unit."""


def seconds_of(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of ``work`` on the device, after one call to warm up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def hbm_bandwidth() -> float:
    """Return the bytes per second that a sum over 4 GiB reads, which decoding is compared with."""
    import torch

    words = torch.ones(1 << 30, dtype=torch.int32, device="cuda")
    return words.nbytes / seconds_of(lambda: words.sum())


def matmul_rate(dtype: str, n: int = 8192) -> float:
    """Return the operations per second of a product of two square matrices."""
    import torch

    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if dtype == "fp8":
        fp8 = torch.float8_e4m3fn
        a, b, one = left.to(fp8), right.to(fp8).T, torch.ones((), device="cuda")
        seconds = seconds_of(
            lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        )
    else:
        seconds = seconds_of(lambda: left @ right)
    return 2 * n**3 / seconds


def devices() -> Figures:
    """Measure the device itself: memory bandwidth and matrix products."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    figures = {
        "memory": (properties.total_memory / 1e9, "GB"),
        "read bandwidth": (hbm_bandwidth() / 1e9, "GB/s"),
        "bf16 matmul": (matmul_rate("bf16") / 1e12, "TFLOP/s"),
    }
    try:
        figures["fp8 matmul"] = (matmul_rate("fp8") / 1e12, "TFLOP/s")
    except (RuntimeError, AttributeError) as error:
        print(f"no fp8 matrix products here: {error}".splitlines()[0])
    return figures


def tests() -> Figures:
    """Run tests/gpu: results on the device against the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/gpu", "-p", "no:cacheprovider"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:])
    if done.returncode:
        raise SystemExit(f"tests/gpu failed: {done.stdout.strip().splitlines()[-1]}")
    return {"tests passed in": (time.perf_counter() - started, "s")}


def model_of(size: str, dtype: str = "bf16"):
    """Return a model of this shape with random weights on the device, quantized if ``dtype`` is a format."""
    import torch

    from herd.llama.config import SIZES
    from herd.llama.model import LlamaLM

    config = SIZES[size]
    if dtype != "bf16":
        from herd.quant import scheme
        from herd.quant.random import random_quantized

        return random_quantized(config, scheme(dtype), dtype=torch.bfloat16).cuda()
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaLM(config)
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return model


def decode(dtype: str, batch: int = 1, steps: int = 64, context: int = 128) -> Figures:
    """Measure decode steps of ``batch`` sequences of ``context`` tokens, and their share of the read
    bandwidth."""
    import torch

    from herd.engine import Engine, Request, Sampling
    from herd.evals.speed import weights_read

    model = model_of("8B", dtype)
    engine = Engine(model, None, max_batch=batch, max_context=1024)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, context), generator=generator).tolist()
    sampling = Sampling(max_tokens=steps + 16, temperature=0)
    streams = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
    for stream in streams:
        next(stream)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        for stream in streams:
            next(stream)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    nbytes = weights_read(model) + batch * context * model.config.kv_nbytes_per_token(2)
    bandwidth = nbytes / seconds
    del streams, engine, model
    torch.cuda.empty_cache()
    return {
        "tokens per second": (batch / seconds, "tokens/s"),
        "achieved bandwidth": (bandwidth / 1e9, "GB/s"),
        "share of read bandwidth": (bandwidth / hbm_bandwidth(), "1"),
    }


def prefill(tokens: int = 2048) -> Figures:
    """Measure the time to the first token of one prompt, and its share of the bf16 matrix rate."""
    import torch

    from herd.engine import Engine, Request, Sampling

    model = model_of("8B")
    engine = Engine(model, None, max_batch=1, max_context=tokens + 64)
    generator = torch.Generator().manual_seed(0)

    def first_token() -> None:
        prompt = torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()
        engine.run([Request(prompt, Sampling(max_tokens=1, temperature=0))])

    seconds = seconds_of(first_token)
    rate = tokens * model.config.flops_per_token(tokens / 2) / seconds
    return {
        "tokens per second": (tokens / seconds, "tokens/s"),
        "share of the bf16 matmul rate": (rate / matmul_rate("bf16"), "1"),
    }


def training(compiled: bool, rows: int = 4, context: int = 4096, steps: int = 8) -> Figures:
    """Measure training steps of the 1B shape in bf16 with AdamW: tokens per second and MFU against
    `matmul_rate`."""
    import torch

    from herd.data.batch import Batch
    from herd.llama.config import SIZES
    from herd.llama.model import LlamaLM
    from herd.train import AdamW, TrainConfig, lm, train

    config = SIZES["1B"].replace(max_context=context)

    class RandomRows:
        def batch(self, position: int, count: int) -> Batch:
            generator = torch.Generator().manual_seed(position)
            tokens = torch.randint(config.vocab_size, (count, context + 1), generator=generator)
            return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    with torch.device("cuda"):
        model = LlamaLM(config).init_weights(0)
    how = TrainConfig(
        steps=steps,
        batch_size=rows,
        micro_batch_size=rows,
        context=context,
        optimizer=AdamW(lr=1e-4),
        dtype="bf16",
    ).model_copy(update={"compile": compiled, "activation_checkpointing": False})
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.reset_peak_memory_stats()
        train(model, RandomRows(), lm, how, folder, on_step=records.append)
    peak = torch.cuda.max_memory_allocated()
    rate = statistics.median(record["tokens_per_s"] for record in records[steps // 2 :])
    flops = rate * config.flops_per_token(context / 2, training=True)
    return {
        "tokens per second": (rate, "tokens/s"),
        "model FLOP utilization of the bf16 matmul rate": (flops / matmul_rate("bf16"), "1"),
        "peak memory": (peak / 1e9, "GB"),
    }


def loss(tokens: int = 8192, width: int = 4096, vocabulary: int = 128_256) -> Figures:
    """Measure the fused linear cross-entropy of the 8B head, forward and backward, against torch's own."""
    import torch
    import torch.nn.functional as F

    from herd.kernels.loss import linear_cross_entropy

    x_ND = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w_VD = (torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device="cuda")
    figures: Figures = {}
    ways = {
        "fused": lambda: linear_cross_entropy(x_ND, w_VD, targets_N).backward(),
        "plain": lambda: F.cross_entropy((x_ND @ w_VD.T).float(), targets_N, reduction="sum").backward(),
    }
    for name, way in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        figures[f"{name}: time"] = (seconds_of(way) * 1e3, "ms")
        figures[f"{name}: peak memory above the inputs"] = (
            (torch.cuda.max_memory_allocated() - before) / 1e9,
            "GB",
        )
    return figures


STEPS: dict[str, tuple[Callable[[], Figures], int]] = {
    "devices": (devices, 60),
    "tests": (tests, 120),
    "decode-bf16": (lambda: decode("bf16"), 60),
    "decode-bf16-batch16": (lambda: decode("bf16", batch=16), 60),
    "prefill-bf16": (prefill, 60),
    "training": (lambda: training(False), 90),
    "training-compiled": (lambda: training(True), 150),
    "loss": (loss, 60),
    "decode-q8": (lambda: decode("q8", steps=16), 120),
    "decode-q4": (lambda: decode("q4", steps=16), 120),
}
"""The steps with the seconds after which each is stopped, the most important ones first."""


def measure_step(name: str) -> None:
    """Run one step in this process, print its figures and write its receipt."""
    import torch

    device = torch.cuda.get_device_name()
    figures = STEPS[name][0]()
    save_receipt(
        f"gpu-{name}",
        what=f"{name} on one {device}, torch {torch.__version__}",
        values={what: (value, unit) for what, (value, unit) in figures.items()},
        seed=0,
    )


def measure_all(*, commit: bool) -> int:
    """Run every step in a process of its own. Return 0 if all succeeded."""
    end = time.monotonic() + SECONDS
    results = {}
    for name, (_, limit) in STEPS.items():
        left = end - time.monotonic()
        if left < 20:
            results[name] = "skipped: the eight minutes are over"
            continue
        print(f"--- {name}", flush=True)
        command = [sys.executable, __file__, name, *(["--commit"] if commit else [])]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=min(limit, left)).returncode
            results[name] = "done" if code == 0 else f"FAILED with exit code {code}, see above"
        except subprocess.TimeoutExpired:
            results[name] = f"FAILED: stopped after {min(limit, left):.0f} s"
    print("--- summary")
    for name, result in results.items():
        print(f"{name:22} {result}")
    return 0 if all(result == "done" for result in results.values()) else 1


def main() -> int:
    parser = bench_parser(__doc__)
    parser.add_argument("step", nargs="?", choices=list(STEPS), help="one step; all of them if left out")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("skipped everything: this Python has no torch")
        return 0
    if not torch.cuda.is_available():
        print(f"skipped everything (no CUDA device): {', '.join(STEPS)}")
        return 0
    if args.step is None:
        return measure_all(commit=args.commit)
    measure_step(args.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
