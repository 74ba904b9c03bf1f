"""Compare methods of tuning SmolLM2-135M-Instruct, on conversations of oasst1.

    HERD_TEST_DATA=../shared/data python bench/tune_methods.py ROW [--limit N] [--commit]

    dpo        15   DPO on the best and the worst reply to a message: on how many held-out pairs the chosen answer
                    gains, beside choosing by length, and 200 prompts of IFEval, before and after
    arms       60   full, LoRA 16, LoRA 64 and QLoRA on dialogs, each with its best of three learning rates: held-out
                    loss at equal tokens and at equal seconds, and the method that `auto` chooses

Minutes are for two quiet cores. Finished parts are kept in --work, so the same command continues after an
interruption. ``--limit N`` makes a row small: N steps, or thousands of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from common import DATA, WORK, run_row, save_receipt
from herd import checkpoint
from herd.data.tuning import read_tuning
from herd.evals.bootstrap import wilson
from herd.evals.tasks.data import Data
from herd.files import write_atomically
from herd.report.receipt import Value
from herd.tune.options import TuneOptions
from herd.tune.run import open_run, tune
from oasst import dialogs, pairs
from tune import FILE, printed

DPO_CONTEXT = 1024
ARM_TOKENS = 40_000
ARMS = {
    "full": ("full", 16, (5e-5, 2e-4, 8e-4)),
    "lora16": ("lora", 16, (5e-4, 2e-3, 8e-3)),
    "lora64": ("lora", 64, (5e-4, 2e-3, 8e-3)),
    "qlora": ("qlora", 16, (5e-4, 2e-3, 8e-3)),
}
"""Method, rank and the three learning rates of each arm."""


# Preferences ------------------------------------------------------------------------------------------------


def dpo_row(args: argparse.Namespace) -> None:
    work = args.work / "dpo"
    train, held = work / "train.jsonl", work / "held.jsonl"
    if not held.exists():
        work.mkdir(parents=True, exist_ok=True)
        roots = sorted({pair["prompt"][0]["content"] for pair in pairs()})
        chosen = set(random.Random(0).sample(roots, len(roots) * 3 // 10))
        parts: dict[bool, list[str]] = {False: [], True: []}
        for pair in pairs():
            parts[pair["prompt"][0]["content"] in chosen].append(json.dumps(pair) + "\n")
        write_atomically(train, "".join(parts[False]))
        write_atomically(held, "".join(parts[True]))
    options = TuneOptions(
        model=str(FILE), data=(str(train),), heldout=str(held), out=str(work / "run"), method="lora", objective="dpo",
        context=DPO_CONTEXT, epochs=None if args.limit else 1.0, steps=args.limit, tasks=("ifeval",),
        other=(str(DATA / "wikitext2" / "valid.txt"),),
    )  # fmt: skip
    open_run(options)
    tuned = tune(options, Data(DATA), on_step=printed)
    before, after = (json.loads((work / "run" / f"{name}.json").read_text()) for name in ("before", "after"))
    margins = {
        name: after["heldout"]["margins"][name] - old for name, old in before["heldout"]["margins"].items()
    }
    tokenizer = checkpoint.load_tokenizer(FILE)
    assert tokenizer is not None
    rows = read_tuning([held], tokenizer, DPO_CONTEXT, mask_ends=True).require_pairs()
    shorter = [sum(rows[int(name)].chosen.mask) < sum(rows[int(name)].rejected.mask) for name in margins]
    right = [margin > 0 for margin in margins.values()]
    accuracy, longer = wilson(sum(right), len(right)), wilson(len(shorter) - sum(shorter), len(shorter))
    among = [won for won, short in zip(right, shorter, strict=True) if short]
    values = {
        "accuracy": Value(accuracy.value, "of the held-out pairs", accuracy.lo, accuracy.hi),
        "longer_is_chosen": Value(longer.value, "of the held-out pairs", longer.lo, longer.hi),
        "accuracy_shorter_chosen": Value(
            sum(among) / len(among), f"of {len(among)} pairs whose chosen answer is shorter"
        ),
        "pairs": Value(len(right), "held-out pairs"),
        "tokens": Value(tuned.result.tokens, "tokens"),
        "seconds": Value(tuned.result.seconds, "s"),
    }
    scored, scored_before = (found["tasks"]["ifeval"] for found in (after, before))
    passed = scored["value"] >= scored_before["lo"]
    values["ifeval"] = Value(
        scored["value"], "fraction", scored["lo"], scored["hi"], f">= {scored_before['lo']:.3f}", passed
    )
    values["ifeval_untuned"] = Value(
        scored_before["value"], "fraction", scored_before["lo"], scored_before["hi"]
    )
    save_receipt(
        "tune-dpo", commit=args.commit, what="DPO of SmolLM2-135M-Instruct with LoRA 16 on pairs of oasst1", seed=0,
        values=values, notes="best against worst ranked reply, each within 512 tokens; 30 % of the conversations held "
        "out; one epoch, defaults; accuracy: pairs whose chosen answer gained more log-likelihood than the rejected",
    )  # fmt: skip


# Methods ----------------------------------------------------------------------------------------------------


def arms_row(args: argparse.Namespace) -> None:
    work = args.work / "arms"
    data = work / "dialogs.jsonl"
    if not data.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(data, "".join(json.dumps({"messages": each}) + "\n" for each in dialogs()))
    tokens = 1000 * args.limit if args.limit else ARM_TOKENS
    values: dict[str, Value] = {}
    best: dict[str, tuple[float, float, float]] = {}  # held-out loss, learning rate, seconds
    for arm, (method, rank, rates) in ARMS.items():
        for rate in rates:
            loss, seconds = _arm(work, data, f"{arm}-{rate:g}", method, rank, rate, tokens)
            values[f"{arm}_{rate:g}"] = Value(loss, "held-out nats/token")
            best[arm] = min(best.get(arm, (math.inf, 0.0, 0.0)), (loss, rate, seconds))
    budget = best["full"][2]
    for arm, (loss, rate, seconds) in best.items():
        method, rank, _ = ARMS[arm]
        equal = max(4096, round(tokens * budget / seconds))
        again, _ = _arm(work, data, f"{arm}-seconds", method, rank, rate, equal)
        values |= {
            f"{arm}_equal_tokens": Value(loss, f"held-out nats/token, lr {rate:g}"),
            f"{arm}_seconds": Value(seconds, "s"),
            f"{arm}_equal_seconds": Value(again, f"held-out nats/token, {equal:,} tokens"),
        }
    winner = min(best, key=lambda arm: values[f"{arm}_equal_seconds"].value)
    chosen = _planned(work, data)
    values["winner"] = Value(winner, "at equal seconds")
    values["auto"] = Value(chosen, "chosen", bar=winner, passed=winner.startswith(chosen))
    save_receipt(
        "tune-arms", commit=args.commit, what="Methods of tuning SmolLM2-135M-Instruct on dialogs of oasst1", seed=0,
        values=values, notes=f"{tokens:,} tokens an arm; equal seconds: those of full fine-tuning, at the best lr",
    )  # fmt: skip


def _arm(
    work: Path, data: Path, name: str, method: str, rank: int, rate: float, tokens: int
) -> tuple[float, float]:
    """Return the held-out loss and the seconds of training of one run."""
    options = TuneOptions(
        model=str(FILE), data=(str(data),), out=str(work / name), method=method, rank=rank, lr=rate, tokens=tokens,  # type: ignore[arg-type]
        context=1024, other=(str(DATA / "wikitext2" / "valid.txt"),),
    )  # fmt: skip
    open_run(options)
    tuned = tune(options, Data(), on_step=printed)
    loss = next(change.after for change in tuned.changes if change.name == "held-out loss")
    print(
        f"{name}: {loss:.4f} after {tuned.result.tokens:,} tokens, {tuned.result.seconds:.0f} s", flush=True
    )
    return loss, tuned.result.seconds


def _planned(work: Path, data: Path) -> str:
    """Return the method that `herd tune` chooses."""
    out = work / "auto"
    shutil.rmtree(out, ignore_errors=True)
    prepared = open_run(TuneOptions(model=str(FILE), data=(str(data),), out=str(out)))
    assert prepared is not None
    return prepared.choice.method


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], None]] = {"dpo": dpo_row, "arms": arms_row}
    run_row(
        __doc__, rows, limit="a small version: steps of dpo, thousands of tokens of arms", work=WORK / "tune"
    )


if __name__ == "__main__":
    main()
