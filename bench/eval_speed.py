"""Compare the speed of `herd eval` with `lm-eval --model hf` on one CPU: same questions, shots and scores.

    HERD_TEST_DATA=../shared/data python bench/eval_speed.py

The model is random, with about 100M parameters and Meta's tokenizer (12 layers, D = 512, vocabulary of 128,256,
tied). The questions are 100 items of 5-shot MMLU (one subject, which is a task in lm-eval) and of 5-shot
HellaSwag. lm-eval uses its own task files and its `hf` model in fp32 on the same threads (--batch), with rows
from the same files. They answer alternately, a part of the items at a time, so that other work on the machine
slows both alike. Tokenizing counts for both, loading for neither.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from common import DATA, ROOT, at_least, bench_parser, save_receipt
from herd.evals.local import CheckpointModel
from herd.files import write_atomically
from herd.llama import ModelConfig
from herd.report.receipt import Value
from lmeval import RIVALS, judged_alike, open_both, oracle, random_folder

MODEL = ModelConfig(128256, 512, 12, 8, 4, 1536, rope_theta=500_000.0, max_context=8192, tie_embeddings=True)
BARS = {"mmlu_astronomy": 5.0, "hellaswag": 3.0}
PARTS = 4
"""Both answer a part, then the next. Each part is kept, so that the same command resumes. Herd begins each
part with nothing cached, which is to its disadvantage."""


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", default=",".join(BARS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "eval_speed")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.tasks.split(","):
        parts = [kept_part(name, part, args) for part in range(PARTS)]
        results[name] = {
            key: sum(part[key] for part in parts) for key in ("items", "same", "herd", "lm_eval")
        }
        results[name] |= {
            "ratio": results[name]["lm_eval"] / results[name]["herd"],
            "params": parts[0]["params"],
        }
        print(name, results[name], flush=True)
    receipt(results, args)


def kept_part(name: str, part: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the result of a part, measuring it if it is missing."""
    path = args.work / f"{name}-{args.limit}-{args.batch}-{args.threads}-{part}.json"
    if not path.is_file():
        write_atomically(path, json.dumps(measure(name, part, args)))
    return json.loads(path.read_text())


@lru_cache(maxsize=1)
def open_both_once(work: Path, batch: int) -> tuple[CheckpointModel, Any]:
    return open_both(random_folder(work / "m100", MODEL), batch)


def measure(name: str, part: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of both for the same items, and how many they decide alike."""
    warm, theirs = open_both_once(args.work, args.batch)
    [(task, herd, items)] = list(oracle.pairs(name, DATA, args.limit))
    by_doc = oracle.instances(task)
    numbers = range(part, len(items), PARTS)
    instances = [instance for number in numbers for instance in by_doc[number]]
    # both warm up on one item
    list(warm.answer([items[0].request]))
    theirs.loglikelihood(by_doc[0][:1], disable_tqdm=True)
    ours = CheckpointModel(warm.model, warm.tokenizer, name="m100", hash=warm.hash)  # with an empty cache
    began = time.perf_counter()
    answers = dict(ours.answer([items[number].request for number in numbers]))
    herd_s = time.perf_counter() - began
    began = time.perf_counter()
    said = theirs.loglikelihood(instances, disable_tqdm=True)
    lm_eval_s = time.perf_counter() - began
    by_number: dict[int, list[Any]] = {}
    for instance, pair in zip(instances, said, strict=True):
        by_number.setdefault(instance.doc_id, []).append(pair)
    docs = task.test_docs()
    same = sum(
        judged_alike(task, herd, items[number], answers[at], docs[number], by_number[number])
        for at, number in enumerate(numbers)
    )
    return {
        "items": len(numbers),
        "same": same,
        "herd": herd_s,
        "lm_eval": lm_eval_s,
        "params": warm.model.config.n_params,
    }


def receipt(results: dict[str, Any], args: argparse.Namespace) -> None:
    values: dict[str, Value | tuple[Any, str]] = {}
    for name, result in results.items():
        bar = BARS[name]
        values[f"{name}_speedup"] = at_least(bar, result["ratio"], "x")
        values[f"{name}_herd"] = (result["herd"], "s")
        values[f"{name}_lm_eval"] = (result["lm_eval"], "s")
        values[f"{name}_same"] = (result["same"], f"of {result['items']} decisions")
    params = next(iter(results.values()))["params"]
    save_receipt(
        "eval_speed",
        what="herd eval compared with lm-eval --model hf on the CPU: same items, shots, scores",
        values=values,
        seed=0,
        rivals=RIVALS,
        notes=f"{params:,} random parameters, fp32, {args.threads} threads, 5 shots, {args.limit} items per "
        "task.",
    )


if __name__ == "__main__":
    main()
