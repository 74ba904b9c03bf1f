"""Train QLoRA adapters of the 8B shape on random weights, and compare the memory with the plan.

    python bench/tune_qlora.py             # about 12 minutes on two cores

Rank 16, two steps of 2,048 tokens. The measure is the bytes of all tensors: the model's and the largest
growth of the process's memory while it trains. glibc is told to return every freed block above 20 MiB at once, so that
freed tensors do not count. `herd tune --check` prints the plan for such a run.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
from typing import Any

import torch

from common import bench_parser, save_receipt
from herd.data.batch import Batch
from herd.kernels import build
from herd.llama.config import SIZES
from herd.llama.lora import add_lora
from herd.machine import peak_memory, reset_peak_memory, resident_memory
from herd.quant import scheme
from herd.quant.linear import use_exact_products
from herd.quant.random import random_quantized
from herd.report.receipt import Value
from herd.train import AdamW, TrainConfig, lm, train
from herd.tune.method import method_nbytes

RANK, ALPHA, TOKENS, SEED = 16, 32.0, 2048, 0


def measure(args: argparse.Namespace) -> None:
    build.ready()
    return_freed_memory()
    config, packing = SIZES[args.size], scheme("q4")
    model = add_lora(random_quantized(config, packing, SEED), RANK, ALPHA / RANK)
    use_exact_products(model)
    resident = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    before = resident_memory()
    reset_peak_memory()

    class RandomTokens:
        def batch(self, position: int, count: int) -> Batch:
            generator = torch.Generator().manual_seed(SEED + position)
            tokens = torch.randint(config.vocab_size, (count, TOKENS + 1), generator=generator)
            return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    plan = TrainConfig(
        steps=2, batch_size=1, context=TOKENS, dtype="bf16", activation_checkpointing=True,
        optimizer=AdamW(lr=1e-3, weight_decay=0.0),
    )  # fmt: skip
    steps: list[dict[str, Any]] = []

    def on_step(record: dict[str, Any]) -> None:
        steps.append(record)
        print(f"step {record['step']}: loss {record['loss']:.4f}, {record['seconds']:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        train(model, RandomTokens(), lm, plan, folder, on_step=on_step)
    most = resident + peak_memory() - before
    planned = method_nbytes(config, "qlora", 1, TOKENS, "bf16", RANK, packing.nbytes(config))
    error = most / planned - 1
    gib = 1 << 30
    lower = steps[1]["loss"] < steps[0]["loss"] + 0.5
    values = {
        "tensors": Value(most / gib, "GiB", bar="<= 7.4", passed=most <= 7.4 * gib),
        "planned": Value(planned / gib, "GiB"),
        "plan_error": Value(error, "relative", bar="within 0.02", passed=abs(error) <= 0.02),
        "resident": Value(resident / gib, "GiB of weights and adapters"),
        "seconds_per_step": Value(steps[1]["seconds"] - steps[0]["seconds"], "s, the second step"),
        "first_loss": Value(steps[0]["loss"], "nats/token"),
        "second_loss": Value(
            steps[1]["loss"], "nats/token", bar="finite, not above the first + 0.5", passed=lower
        ),
        "gradient_norm": Value(steps[0]["grad_norm"], "norm of the first gradient"),
    }
    save_receipt(
        "tune-qlora-8b", commit=args.commit, values=values, seed=SEED,
        what=f"QLoRA {RANK} of the {args.size} shape, random weights ({packing.label}), two steps of {TOKENS} "
        f"tokens, bf16 products, {args.threads} threads",
        notes="tensors: weights, adapters and the largest growth of the process during both steps",
    )  # fmt: skip


def return_freed_memory() -> None:
    """Let glibc return freed blocks above 20 MiB at once. A tile of weights is smaller and is kept."""
    mmap_threshold = -3  # <malloc.h>
    ctypes.CDLL(None).mallopt(mmap_threshold, 20 << 20)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--size", default="8B")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
