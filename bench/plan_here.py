"""Compare the planner with this machine: twelve configurations, predicted and then run.

    python bench/plan_here.py                 # all twelve, about ten minutes
    python bench/plan_here.py chat-8B-q4      # only this one (the receipt keeps the others' rows)

Chat (decode and prefill at true shapes with random weights), training (small models, forward to Adam),
quantizing (a bf16 folder to blocks). Each runs in its own process, and the peak memory is read from the
system. Nothing is fitted: the inputs of a prediction (matmul rates by format and rows, attention,
bandwidth, rounding, hashing, one and two training blocks) are measured alternately with the run itself, so
that other work on the machine slows both alike. For time, the ratio is taken within each round, and the median of
the rounds counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import at_most, bench_parser, receipt_path, save_receipt
from herd.report.receipt import Value, read_receipt

ROUNDS = 3
PROMPT, CONTEXT, STEPS = 512, 512, 8
CHAT = {
    "chat-8B-q4": ("8B", "Q4_0"),
    "chat-3B-q4k": ("3B", "Q4_K_M"),
    "chat-3B-q8": ("3B", "Q8_0"),
    "chat-1B-bf16": ("1B", "bf16"),
}
TRAIN = {  # (dim, layers, rows, context, dtype, activation_checkpointing)
    "train-256x5": (256, 5, 16, 256, "fp32", False),
    "train-384x6-bf16": (384, 6, 16, 256, "bf16", False),
    "train-512x8": (512, 8, 8, 256, "fp32", False),
    "train-768x8-checkpointing": (768, 8, 8, 512, "bf16", True),
}  # fmt: skip
QUANTIZE = {
    "quantize-q8": "q8",
    "quantize-q4": "q4",
    "quantize-q4k": "q4k",
    "quantize-q4-larger": "q4-larger",
}
NAMES = (*CHAT, *TRAIN, *QUANTIZE)
MEMORY_SLACK = 100e6
Record = dict[str, Any]


# One configuration, in a process of its own
# --------------------------------------------------------------------------


def worker(name: str) -> Record:
    """``tensors``, ``peak`` and times, each predicted and measured."""
    kind = name.partition("-")[0]
    return {"chat": chat, "train": train, "quantize": quantize}[kind](name)


def base_rss() -> int:
    """Resident bytes of this process before there is any model. The high-water mark begins here."""
    import psutil

    from herd.machine import reset_peak_memory

    reset_peak_memory()
    return psutil.Process().memory_info().rss


def blank(**measured: Any) -> Any:
    """Return a profile of only the given values, so that they are measured close to the run in time."""
    from herd.plan.profile import Profile

    nothing = Profile(
        key="", date="", cpu="", cores=0, isa=(), memory=0, threads=1, bandwidth={1: 1.0}, gemm={},
        attention_prefill={}, attention_decode={}, pointwise=1.0, between={}, encode={}, hash=1.0, hash_all=1.0,
        disk=None, disk_write=None, base=0, seconds=0.0,
    )  # fmt: skip
    return dataclasses.replace(nothing, **measured)


def chat(name: str) -> Record:
    import torch

    from herd.evals.speed import Runner, Work
    from herd.kernels import build
    from herd.llama.config import SIZES
    from herd.machine import peak_memory
    from herd.plan import measure, ways
    from herd.quant.mixtures import named_scheme
    from herd.quant.random import random_quantized

    build.ready()
    size, quant = CHAT[name]
    config, form = SIZES[size], next(f for f in ways.GGUF_FORMATS if f.name == quant)
    base = base_rss()
    model = random_quantized(
        config, named_scheme(quant, config), dtype=torch.bfloat16 if quant == "bf16" else torch.float32
    )
    longest = max(PROMPT, CONTEXT) + (ROUNDS + 2) * (STEPS + 1)
    runner = Runner(model, context=longest, batch=1)
    runner.prefill(Work("prefill", PROMPT))
    peak = peak_memory()
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    kind = runner.engine.cache.kind
    tensors = sum(held.values()) + runner.engine.cache.nbytes
    planned = ways.plan_way(ways.MeasuredTarget(blank(base=base), 0.0), config, form, kind, PROMPT + 1)

    layers = {part: measure.linears(part) for part in {form.dtype, form.head_dtype}}

    def profile() -> Any:
        rates = {part: measure.matmul_rates(part, layers[part], (1, PROMPT)) for part in layers}
        return blank(
            threads=torch.get_num_threads(),
            bandwidth=measure.bandwidths(all_counts=False),
            gemm=rates,
            attention_prefill={kind: measure.attention_prefill(kind, 0, PROMPT)},
            attention_decode={kind: measure.attention_decode(kind, CONTEXT)},
            pointwise=measure.pointwise_bandwidth(),
            between=measure.between_operators(),
        )

    predicted: dict[str, list[float]] = {"decode": [], "prefill": []}
    measured: dict[str, list[float]] = {"decode": [], "prefill": []}
    runner.start(Work("decode", CONTEXT), (ROUNDS + 2) * STEPS)
    runner.steps(2)
    before = _with(profile)
    for _ in range(ROUNDS):
        decode = statistics.median(runner.steps(STEPS))
        measured["decode"].append(decode)
        middle = _with(profile)
        here = [ways.MeasuredTarget(p, 1e12) for p in (before, middle)]
        predicted["decode"].append(statistics.fmean(h.decode(config, form, kind, CONTEXT) for h in here))
        before = middle
    runner.stop()
    for _ in range(ROUNDS):
        measured["prefill"].append(runner.prefill(Work("prefill", PROMPT)))
        middle = _with(profile)
        here = [ways.MeasuredTarget(p, 1e12) for p in (before, middle)]
        predicted["prefill"].append(statistics.fmean(h.prefill(config, form, kind, PROMPT) for h in here))
        before = middle
    return {
        "tensors": [planned.weights_nbytes + planned.kv_nbytes, tensors],
        "peak": [planned.resident, peak],
        "predicted": predicted,
        "measured": measured,
    }


def _with(profile: Callable[[], Any]) -> Any:
    import torch

    with torch.inference_mode():
        return profile()


def train(name: str) -> Record:
    import torch

    from herd import machine
    from herd.data.batch import Batch
    from herd.kernels import build
    from herd.life.plan import toy_config
    from herd.llama.config import ModelConfig
    from herd.llama.model import LlamaLM
    from herd.machine import peak_memory
    from herd.plan import rehearse
    from herd.train import lm
    from herd.train import train as run
    from herd.train.memory import kept_nbytes, train_nbytes
    from herd.train.recipe import parse_recipe

    build.ready()
    machine.keep_freed_memory()
    dim, n_layers, rows, context, dtype, activation_checkpointing = TRAIN[name]
    config = toy_config(dim, n_layers, 4096).replace(max_context=context)
    steps = 6
    fields = {
        k: getattr(config, k) for k in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
    }
    text = json.dumps(
        {
            "name": name,
            "model": {"shape": fields | {"max_context": context, "tie_embeddings": True}},
            "tokenizer": {"train_vocab": 4096},
            "data": {"kind": "text", "paths": ["builtin"]},
            "objective": {"kind": "lm"},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "train": {
                "steps": steps,
                "batch_size": rows,
                "context": context,
                "dtype": dtype,
                "activation_checkpointing": activation_checkpointing,
            },
            "out": "unused",
        }
    )
    recipe = parse_recipe(text)

    class Rows:
        """Random tokens: what they say does not matter for the time."""

        def batch(self, position: int, count: int) -> Batch:
            generator = torch.Generator().manual_seed(position)
            tokens = torch.randint(0, 4096, (count, context + 1), generator=generator)
            return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def real(shape: ModelConfig = config) -> tuple[float, int]:
        """(median seconds of a step, bytes of the parameters)."""
        times: list[float] = []
        model = LlamaLM(shape).init_weights(0)
        last = time.perf_counter()

        def on_step(record: dict[str, Any]) -> None:
            nonlocal last
            now = time.perf_counter()
            times.append(now - last)
            last = now

        with tempfile.TemporaryDirectory() as folder:
            run(model, Rows(), lm, recipe.config, folder, on_step=on_step)
        held = sum(p.nbytes for p in model.parameters())
        return statistics.median(times[1:]), held

    # What is imported on first use belongs to the process, not to the model.
    real(toy_config(64, 1, 4096).replace(max_context=context))
    base = base_rss()
    _, weights = real()
    peak = peak_memory()
    sized = train_nbytes(
        config, rows, context, dtype=dtype, activation_checkpointing=activation_checkpointing
    )
    predicted: dict[str, list[float]] = {"step": []}
    measured: dict[str, list[float]] = {"step": []}
    for _ in range(ROUNDS):
        outlook = rehearse.outlook_here(recipe, rehearse.run_rehearsal(recipe))
        predicted["step"].append(outlook.step_seconds)
        measured["step"].append(real()[0])
    return {
        "tensors": [sized.weights, weights],
        "peak": [
            base
            + kept_nbytes(
                config, rows, context, dtype=dtype, activation_checkpointing=activation_checkpointing
            ),
            peak,
        ],
        "predicted": predicted,
        "measured": measured,
    }


def quantize(name: str) -> Record:
    import torch

    from herd import checkpoint
    from herd.kernels import build
    from herd.llama.config import ModelConfig
    from herd.machine import peak_memory
    from herd.plan import measure, quantizing
    from herd.quant import scheme

    build.ready()
    to, _, larger = QUANTIZE[name].partition("-")
    config = ModelConfig(32_000, 2048, 6 if larger else 3, 32, 8, 8192, tie_embeddings=True, max_context=8192)
    plan = scheme(to)
    with tempfile.TemporaryDirectory(prefix="herd-plan-") as text:
        folder = Path(text)
        script = (
            "import sys, torch; from herd import checkpoint; from herd.llama.config import ModelConfig; "
            "from herd.llama.model import LlamaLM; torch.set_default_dtype(torch.bfloat16); "
            f"m = LlamaLM({config!r}); [p.data.uniform_(-0.02, 0.02) for p in m.parameters()]; "
            "checkpoint.save_model(sys.argv[1], m)"
        )
        script = script.replace("rope_scaling=None, ", "")
        subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(folder / "source")], check=True)
        base = base_rss()
        predicted: dict[str, list[float]] = {"whole": []}
        measured: dict[str, list[float]] = {"whole": []}
        peak = 0
        for number in range(ROUNDS):
            began = time.perf_counter()
            checkpoint.quantize_folder(
                checkpoint.ImportSource(folder / "source"), folder / f"out{number}", plan
            )
            measured["whole"].append(time.perf_counter() - began)
            peak = peak or peak_memory()
            with torch.inference_mode():
                one, every = measure.hash_rates()
                made = blank(
                    encode={part: measure.encode_rate(part) for part in {to, "q8"}},
                    hash=one,
                    hash_all=every,
                    disk_write=measure.disk_bandwidths(folder)[1],
                )
            predicted["whole"].append(quantizing.quantize_seconds(made, config, plan))
        out = (folder / "out0" / "model.gguf").stat().st_size
    return {
        "tensors": [plan.nbytes(config), out],
        "peak": [base + quantizing.quantize_nbytes(config, plan), peak],
        "predicted": predicted,
        "measured": measured,
    }


# All of them, and the receipt
# ----------------------------------------------------------------------------------------


def values_of(name: str, record: Record) -> dict[str, Value]:
    """Return the values of a configuration: bytes and seconds, predicted and measured, and the errors."""
    values: dict[str, Value] = {}
    for part in ("tensors", "peak"):
        predicted, measured = record[part]
        error = abs(predicted / measured - 1)
        allowed = 0.02 if part == "tensors" else max(0.05, MEMORY_SLACK / measured)
        values[f"{name}/{part} predicted"] = Value(round(predicted), "bytes")
        values[f"{name}/{part} measured"] = Value(round(measured), "bytes")
        values[f"{name}/{part} error"] = at_most(allowed, error, "fraction", shown=f"≤ {100 * allowed:.1f} %")
    for kind in record["measured"]:
        ratios = sorted(
            p / m for p, m in zip(record["predicted"][kind], record["measured"][kind], strict=True)
        )
        ratio = statistics.median(ratios)
        values[f"{name}/{kind} predicted"] = Value(statistics.median(record["predicted"][kind]), "s")
        values[f"{name}/{kind} measured"] = Value(statistics.median(record["measured"][kind]), "s")
        values[f"{name}/{kind} time error"] = at_most(
            0.25, abs(ratio - 1), "fraction", abs(ratios[0] - 1), abs(ratios[-1] - 1), shown="≤ 25 %"
        )
    return values


def main() -> None:
    """Run the configurations that are asked for and keep the receipt's values of the others."""
    parser = bench_parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker)))
        return
    unknown = set(args.names) - set(NAMES)
    if unknown:
        sys.exit(f"no configuration {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    places = [receipt_path("plan-here", commit=commit) for commit in {args.commit, True}]
    known = next((read_receipt(path).values for path in places if path.exists()), {})
    values = {key: value for key, value in known.items() if "/" in key}
    for name in args.names or NAMES:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", name], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        if done.returncode:
            sys.exit(f"{name} failed")
        found = values_of(name, json.loads(done.stdout.splitlines()[-1]))
        values = {key: value for key, value in values.items() if not key.startswith(f"{name}/")} | found
        print(
            "\n".join(f"{key:44} {value.value:>16,.4g} {value.bar or ''}" for key, value in found.items()),
            flush=True,
        )
        write(values)


def write(values: dict[str, Value]) -> None:
    """Write the receipt, with the median and the worst error over all its configurations."""
    ordered = {key: values[key] for name in NAMES for key in values if key.startswith(f"{name}/")}
    errors = [float(value.value) for key, value in ordered.items() if key.endswith("time error")]
    middle, worst = statistics.median(errors), max(errors)
    head = {
        "configurations": Value(len({key.partition("/")[0] for key in ordered}), "configurations"),
        "time, median error": at_most(0.1, middle, "fraction", shown="≤ 10 %"),
        "time, worst error": at_most(0.25, worst, "fraction", shown="≤ 25 %"),
    }
    save_receipt(
        "plan-here",
        what="twelve configurations on this machine, predicted by the planner and run: memory and time",
        values=head | ordered,
        seed=0,
        notes="profile re-measured in turn with the runs; nothing fitted; errors of time are medians over "
        "rounds",
    )


if __name__ == "__main__":
    main()
