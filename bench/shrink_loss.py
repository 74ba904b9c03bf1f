"""Rows of `bench/shrink.py` about the objective: draws against the whole distribution, and the memory of the loss."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from herd import checkpoint
from herd.machine import peak_memory, reset_peak_memory
from herd.report.receipt import Value
from shrinking import on_step, open_pipeline, quality, receipt, student85_arm, valued  # fmt: skip


def sampled_row(args: argparse.Namespace) -> None:
    """The same rows in the same order for all three; only the objective differs."""
    from herd.data.targets import Targets, TargetStream
    from herd.train import AdamW, Cosine, TrainConfig, distil, lm, train
    from herd.train.objectives import sampled_distil

    pipeline = open_pipeline(args)
    tokens = 4_096 if args.limit else 100_000
    arm = student85_arm(pipeline)
    pipeline.speeds(arm.config)
    pipeline.start(arm)
    folder = pipeline.targets(arm.config.vocab_size, tokens)
    s, values = pipeline.settings, {}
    for name, objective in {
        "50 draws": sampled_distil(),
        "whole distribution": distil(pipeline.teacher),
        "text alone": lm,
    }.items():

        def work(objective: Any = objective, name: str = name) -> dict[str, Any]:
            model = checkpoint.load_model(pipeline.cells.folder / "arms" / arm.name / "start")
            config = TrainConfig(
                steps=s.steps(tokens), batch_size=s.batch_size, context=s.context, dtype=s.dtype, save_every=50,
                optimizer=AdamW(lr=s.learning_rate(arm.config), weight_decay=0.0),
                schedule=Cosine(warmup_steps=max(1, s.steps(tokens) // 20)),
            )  # fmt: skip
            out = pipeline.cells.folder / f"sampled-{name.replace(' ', '-')}"
            result = train(
                model, TargetStream(Targets(folder), s.seed), objective, config, out, on_step=on_step
            )
            found = pipeline.evaluator(arm.config.vocab_size).measure(model.eval())
            return {"quality": found.record(), "seconds": result.seconds}

        record = pipeline.cells.run(f"sampled-{name}", f"training on {name}", None, work)
        values |= valued(name, quality(record))
        values[f"{name}: seconds"] = Value(record["seconds"], "s")
    made = Targets(folder)
    nbytes = made.nbytes / (made.spec.n_rows * s.context) * 1.3e6
    values["bytes of 1.3 M tokens of targets"] = Value(
        nbytes, "bytes", bar="≤ 130 MB", passed=nbytes <= 130e6
    )
    gap = float(values["50 draws: kl"].value) - float(values["whole distribution: kl"].value)
    values["KL with 50 draws minus whole"] = Value(gap, "nats/token", bar="≤ 0.02", passed=gap <= 0.02)
    ratio = float(values["50 draws: seconds"].value) / float(values["text alone: seconds"].value)
    values["time of a step from the cache / of text alone"] = Value(
        ratio, "×", bar="≤ 1.1", passed=ratio <= 1.1
    )
    receipt(args, f"FFN {arm.config.ffn_dim} after {tokens:,} tokens by objective", values)


def loss_row(args: argparse.Namespace) -> None:
    """Peak memory of the loss of N tokens over Llama 3's vocabulary, forward and backward, one process each.

    The comparison is in fp32, in which weights are trained: in bf16 the fused loss still adds up the gradient of the
    weight in fp32. The long one is in bf16, and counts the whole process.
    """
    import subprocess

    N, V, D = (256, 16_384, 512) if args.limit else (1_024, 128_256, 4_096)
    jobs = {kind: (kind, N, "float32") for kind in ("plain", "fused", "sampled")}
    jobs["long"] = ("fused", 8 * N, "bfloat16")
    peaks = {}
    for name, (kind, n, dtype) in jobs.items():
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import shrink_loss; "
        code += f"print(*shrink_loss.peaks_of_loss({kind!r}, {n}, {V}, {D}, {dtype!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        beyond, whole = map(int, done.stdout.split()[-2:])
        peaks[name] = whole if name == "long" else beyond
        print(name, f"{peaks[name] / 1e9:.2f} GB", flush=True)
    values = {f"peak, {kind}": Value(peaks[kind], "bytes") for kind in ("plain", "fused", "sampled")}
    ratio = peaks["plain"] / peaks["fused"]
    values["plain / fused"] = Value(ratio, "×", bar="≥ 6", passed=ratio >= 6)
    values[f"whole process, fused, {8 * N:,} tokens in bf16"] = Value(
        peaks["long"], "bytes", bar="≤ 12 GB", passed=peaks["long"] <= 12e9
    )
    what = (
        f"KL of {N:,} tokens, V {V:,}, D {D:,}, fp32: bytes above weights, hidden states and their gradients"
    )
    receipt(args, what, values)


def peaks_of_loss(kind: str, N: int, V: int, D: int, dtype_name: str) -> tuple[int, int]:
    """Return the bytes that a loss needs beyond its inputs and their gradients, and those of the whole process."""
    import torch.nn.functional as F

    from herd.kernels.loss import SampledTargets, linear_distil, linear_sampled_distil

    dtype = getattr(torch, dtype_name)
    hidden, weight = (
        torch.randn(shape, dtype=dtype).mul_(0.02).requires_grad_() for shape in ((N, D), (V, D))
    )
    teacher, theirs = (torch.randn(shape, dtype=dtype).mul_(0.02) for shape in ((N, D), (V, D)))
    targets = torch.randint(0, V, (N,))
    reset_peak_memory()
    before = peak_memory()
    if kind == "plain":
        log_p, log_q = ((h @ w.T).float().log_softmax(-1) for h, w in ((teacher, theirs), (hidden, weight)))
        loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    elif kind == "fused":
        loss = linear_distil(hidden, weight, targets, teacher, theirs).total
    else:
        ids = torch.randint(0, V, (N, 16))
        drawn = SampledTargets(ids, torch.full((N, 16), 1 / 16), torch.full((N, 16), -3.0))
        loss = linear_sampled_distil(hidden, weight, targets, drawn).total
    loss.backward()
    whole = peak_memory()
    return whole - before - (weight.numel() + hidden.numel()) * dtype.itemsize, whole
