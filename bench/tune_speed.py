"""Compare the speed and memory of tuning SmolLM2-135M-Instruct, alternating in one run.

    HERD_TEST_DATA=../shared/data python bench/tune_speed.py ROW [--commit]

    lora        8 min   LoRA of rank 16 on all linear layers, 4 x 512 tokens, against peft on transformers, each with
                        its fastest dtype: tokens per second, and the largest resident set of each process
    packed      3 min   LoRA 16 on dialogs of oasst1, packed into rows of 512 and padded, four to a batch, in their own
                        order and grouped by length: equal losses, tokens per second

In `lora` every token is trained. First each side chooses its settings, every candidate in its own process. Then
the fastest of each side, and those within 5 % of it, alternate, one step each. A step is forward, backward,
clipping at norm 1 and an AdamW update of the adapters. Minutes are for two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common import DATA, WORK, bench_parser, save_receipt
from contestant import answer_steps
from herd import checkpoint
from herd.report.receipt import Value
from train_throughput import close_to_best, match, tournament

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = WORK / "tune" / "SmolLM2-135M-Instruct"
"""The file's weights in bf16, as a checkpoint folder that transformers loads too."""
ROWS, CONTEXT, RANK, ALPHA, SEED = 4, 512, 16, 32.0, 0
TOKENS = ROWS * CONTEXT
PEFT = {
    "peft bf16 weights": "peft bf16",
    "peft bf16 weights, compiled": "peft bf16 compile",
    "peft bf16 autocast": "peft autocast",
    "peft fp32": "peft fp32",
}
HERD = {"herd bf16": "herd bf16", "herd fp32": "herd fp32"}
SPEED_BAR, MEMORY_BAR = 1.5, 0.7
N_DIALOGS = 64


def base_folder() -> Path:
    """Return the folder of the model in bf16, written at the first call."""
    if not (BASE / "config.json").exists():
        model = checkpoint.load_trainable(str(FILE), torch.float32, torch.device("cpu"))
        weights = dict(model.named_parameters())
        tokenizer = checkpoint.load_tokenizer(str(FILE))
        checkpoint.write_checkpoint(
            BASE, model.config, lambda name: weights[name].detach(), tokenizer, dtype=torch.bfloat16
        )
    return BASE


# LoRA against peft ------------------------------------------------------------------------------------------


def peft_step(words: list[str]) -> Callable[[], float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if "bf16" in words else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        BASE, dtype=dtype, attn_implementation="sdpa", use_cache=False
    )
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype="bf16" not in words).train()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in words):
            return model(input_ids=tokens, labels=tokens).loss

    return stepper(model, torch.compile(loss) if "compile" in words else loss)


def herd_step(words: list[str]) -> Callable[[], float]:
    from herd import machine
    from herd.data.batch import Batch
    from herd.kernels import build
    from herd.train import lm
    from herd.train.adapters import AdapterSection
    from herd.train.objectives import batch_loss

    machine.keep_freed_memory()
    build.ready()
    dtype = torch.bfloat16 if "bf16" in words else torch.float32
    section = AdapterSection(rank=RANK, alpha=ALPHA)
    model = section.load(str(BASE), SEED, dtype, torch.device("cpu"))

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        targets = torch.full_like(tokens, -100)
        targets[:, :-1] = tokens[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return batch_loss(model, lm, Batch(tokens, targets)).total / (ROWS * (CONTEXT - 1))

    return stepper(model, loss)


def stepper(model: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], float]:
    """Return a function that makes one update on the first tokens of an encyclopedia and returns the loss."""
    tokenizer = checkpoint.load_tokenizer(str(FILE))
    assert tokenizer is not None
    text = next((DATA / "wikitext2").rglob("*test*")).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text[: 12 * TOKENS])[:TOKENS]).view(ROWS, CONTEXT)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> float:
        total = loss(tokens)
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total.detach())

    return step


def contestant(words: list[str], threads: int) -> None:
    """Answer as the contestant that ``words`` name."""
    answer_steps(lambda: herd_step(words) if words[0] == "herd" else peft_step(words), threads, SEED)


def lora_row(args: argparse.Namespace) -> None:
    base_folder()
    candidates = PEFT | HERD
    field: dict[str, dict[str, float]] = {}
    for side in (PEFT, HERD):
        field |= tournament(side, args.threads, TOKENS)
    finalists = [name for side in ("peft", "herd") for name in close_to_best(field, side)]
    record = match({name: candidates[name] for name in finalists}, args.rounds, args.threads)
    pace = {name: statistics.median(each["seconds"]) for name, each in record.items()}
    theirs, ours = (min((n for n in pace if n.startswith(s)), key=pace.__getitem__) for s in ("peft", "herd"))
    values: dict[str, Value] = {}
    for side, name in (("peft", theirs), ("herd", ours)):
        low, middle, high = statistics.quantiles([TOKENS / s for s in record[name]["seconds"]], n=4)
        values[f"{side}_pace"] = Value(middle, "tokens/s", low, high)
        values[f"{side}_peak"] = Value(max(record[name]["peak"]), "bytes")
        values[f"{side}_settings"] = Value(name, "name")
        values[f"{side}_first_loss"] = Value(record[name]["loss"][0], "nats/token")
    ratios = [a / b for a, b in zip(record[theirs]["seconds"], record[ours]["seconds"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    memory = max(record[ours]["peak"]) / max(record[theirs]["peak"])
    values["pace_ratio"] = Value(ratio, "ratio", low, high, f">= {SPEED_BAR}", ratio >= SPEED_BAR)
    values["peak_ratio"] = Value(memory, "ratio", bar=f"<= {MEMORY_BAR}", passed=memory <= MEMORY_BAR)
    tried = ", ".join(
        f"{name} {TOKENS / each['seconds']:.0f} tokens/s {each['peak'] / 1e9:.2f} GB"
        for name, each in field.items()
    )
    save_receipt(
        "tune-lora-speed", commit=args.commit, values=values, seed=SEED,
        what=f"LoRA {RANK} of SmolLM2-135M, steps of {ROWS} x {CONTEXT} tokens, {args.threads} threads, alternated "
        "with peft on transformers; peak is the whole process's largest resident set",
        rivals={name: version(name) for name in ("peft", "transformers", "torch")},
        notes=f"Settings tried (best of three steps): {tried}.",
    )  # fmt: skip


# Packed against padded --------------------------------------------------------------------------------------


def packed_row(args: argparse.Namespace) -> None:
    from herd.data.batch import Batch
    from herd.data.packing import DialogStream
    from herd.train import lm
    from herd.train.objectives import batch_loss

    examples = _examples()[:N_DIALOGS]
    by_length = sorted(examples, key=lambda one: len(one.ids))
    stream = DialogStream(examples, CONTEXT, SEED, pad_id=0)
    ways: dict[str, list[Batch]] = {
        "packed": [
            stream.batch(row, min(ROWS, stream.n_rows - row)) for row in range(0, stream.n_rows, ROWS)
        ],
        "padded": [_padded(examples[first : first + ROWS]) for first in range(0, len(examples), ROWS)],
        "grouped": [_padded(by_length[first : first + ROWS]) for first in range(0, len(examples), ROWS)],
    }
    n_tokens = sum(len(one.ids) - 1 for one in examples)
    values: dict[str, Value] = {
        "dialogs": Value(len(examples), "dialogs"),
        "tokens": Value(n_tokens, "tokens"),
    }

    model = _adapted(torch.float32)
    losses = {}
    for name, batches in ways.items():
        with torch.no_grad():
            parts = [batch_loss(model, lm, batch) for batch in batches]
        losses[name] = sum(float(part.total) for part in parts) / sum(int(part.denominator) for part in parts)
    difference = max(losses.values()) - min(losses.values())
    values["loss"] = Value(losses["packed"], "nats/token, fp32")
    values["loss_difference"] = Value(difference, "nats/token", bar="<= 1e-5", passed=difference <= 1e-5)

    model = _adapted(torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, args.rounds):
        for name, batches in ways.items():
            began = time.perf_counter()
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    batch_loss(model, lm, batch).total.backward()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    for name, each in seconds.items():
        low, middle, high = statistics.quantiles([n_tokens / one for one in each], n=4)
        size = sum(batch.tokens_BT.numel() for batch in ways[name])
        values[f"{name}_pace"] = Value(middle, "tokens/s", low, high)
        values[f"{name}_used"] = Value(n_tokens / size, "of the positions")
    for name in ("padded", "grouped"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["packed"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        values[f"packed_vs_{name}"] = Value(middle, "ratio of tokens/s", low, high)
    save_receipt(
        "tune-packed", commit=args.commit, values=values, seed=SEED,
        what=f"LoRA {RANK} of SmolLM2-135M on the same dialogs of oasst1, packed into {CONTEXT} tokens and padded",
        notes="forward and backward in bf16, medians; padded to the longest of four dialogs; grouped: by length",
    )  # fmt: skip


def _examples() -> list[Any]:
    """Return the dialogs of oasst1 that fit into a row, as rendered by the model's chat template."""
    from herd.data.tuning import read_tuning
    from oasst import dialogs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dialogs.jsonl"
        file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in dialogs()))
        tokenizer = checkpoint.load_tokenizer(str(FILE))
        assert tokenizer is not None
        return [example.rendered for example in read_tuning([file], tokenizer, CONTEXT).require_examples()]


def _padded(examples: list[Any]) -> Any:
    """Return one row for each example, padded to the longest."""
    from herd.data.batch import IGNORE, Batch

    longest = max(len(one.ids) for one in examples) - 1
    tokens_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    targets_BT = torch.full((len(examples), longest), IGNORE)
    for row, one in enumerate(examples):
        ids_N, mask_N = torch.tensor(one.ids), torch.tensor(one.mask)
        tokens_BT[row, : len(ids_N) - 1] = ids_N[:-1]
        targets_BT[row, : len(ids_N) - 1] = torch.where(mask_N[1:], ids_N[1:], IGNORE)
    return Batch(tokens_BT, targets_BT)


def _adapted(dtype: torch.dtype) -> Any:
    """Return the model with adapters that change it, ready to train."""
    from herd.kernels import build
    from herd.llama.lora import lora_layers
    from herd.train.adapters import AdapterSection

    build.ready()
    base_folder()
    model = AdapterSection(rank=RANK, alpha=ALPHA).load(str(BASE), SEED, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(SEED)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.01, generator=generator)
    return model


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], Any]] = {
        "lora": lora_row, "packed": packed_row
    }  # fmt: skip
    parser = bench_parser(__doc__)
    parser.add_argument("row", choices=rows, nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        contestant(args.contestant.split(), args.threads)
        return
    torch.set_num_threads(args.threads)
    rows[args.row](args)


if __name__ == "__main__":
    main()
