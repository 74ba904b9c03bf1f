"""Compare the speed of `herd eval` with `lm-eval --model hf` on one CPU: same questions, shots and scores.

    HERD_TEST_DATA=../shared/data python bench/eval_speed.py

The model is random, with about 100M parameters and Meta's tokenizer (12 layers, D = 512, 128,256 words,
tied). The questions are 100 items of 5-shot MMLU (one subject, which is a task in lm-eval) and of 5-shot
HellaSwag. lm-eval uses its own task files and its `hf` model in fp32 on the same threads (--batch), with rows
from the same files. Both answer in turns, a part of the items at a time, so that other work on the machine
slows both alike. Tokenizing counts for both, loading for neither.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from common import DATA, ROOT, bench_parser, save_receipt
from herd import checkpoint
from herd.evals.local import CheckpointModel
from herd.files import write_atomically
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.report.receipt import Value, package_version
from herd.text.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "tests" / "evals"))
import lmeval_oracle as oracle

BARS = {"mmlu_astronomy": 5.0, "hellaswag": 3.0}
PARTS = 4
"""Both answer a part, then the next; each part is kept, so that the same command goes on. Herd begins each
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


def model_folder(work: Path) -> Path:
    """Return the folder of the random model; make it if it is missing."""
    folder = work / "m100"
    if not folder.exists():
        config = ModelConfig(
            128256, 512, 12, 8, 4, 1536, rope_theta=500_000.0, max_context=8192, tie_embeddings=True
        )
        tokenizer = Tokenizer.from_file(DATA / "llama3_tokenizer" / "tokenizer.model")
        model = LlamaLM(config).init_weights(0)
        checkpoint.save_model(folder, model, tokenizer, lineage=checkpoint.Lineage(name="m100", stage="lm"))
    return folder


def kept_part(name: str, part: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the result of a part; measure it if it is missing."""
    path = args.work / f"{name}-{args.limit}-{args.batch}-{args.threads}-{part}.json"
    if not path.is_file():
        write_atomically(path, json.dumps(measure(name, part, args)))
    return json.loads(path.read_text())


@lru_cache(maxsize=1)
def open_both(folder: Path, batch: int) -> tuple[LlamaLM, Tokenizer, Any]:
    """Open the same files in Herd and in lm-eval's transformers model."""
    from lm_eval.models.huggingface import HFLM

    model = checkpoint.load_model(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = checkpoint.load_tokenizer(folder)
    assert tokenizer is not None
    return (
        model,
        tokenizer,
        HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch, max_length=8192),
    )


def measure(name: str, part: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of both for the same items, and how many they decide alike."""
    model, tokenizer, theirs = open_both(model_folder(args.work), args.batch)
    [(task, herd, items)] = list(oracle.pairs(name, DATA, args.limit))
    by_doc = oracle.instances(task)
    numbers = range(part, len(items), PARTS)
    instances = [instance for number in numbers for instance in by_doc[number]]
    # both warm up on one item
    list(fresh(model, tokenizer).answer([items[0].request]))
    theirs.loglikelihood(by_doc[0][:1], disable_tqdm=True)
    ours = fresh(model, tokenizer)
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
    same = 0
    for at, number in enumerate(numbers):
        judged = herd.judge(items[number], answers[at])
        found = {herd.metric: judged.value, **judged.metrics}
        expected = task.process_results(docs[number], by_number[number])
        same += all(found[metric] == value for metric, value in expected.items())
    return {
        "items": len(numbers),
        "same": same,
        "herd": herd_s,
        "lm_eval": lm_eval_s,
        "params": model.config.n_params,
    }


def fresh(model: LlamaLM, tokenizer: Tokenizer) -> CheckpointModel:
    """Return Herd with an empty cache."""
    return CheckpointModel(model, tokenizer, name="m100", hash="0" * 64)


def receipt(results: dict[str, Any], args: argparse.Namespace) -> None:
    values: dict[str, Value | tuple[Any, str]] = {}
    for name, result in results.items():
        bar = BARS[name]
        values[f"{name}_speedup"] = Value(
            result["ratio"], "x", bar=f"≥ {bar:g}", passed=result["ratio"] >= bar
        )
        values[f"{name}_herd"] = (result["herd"], "s")
        values[f"{name}_lm_eval"] = (result["lm_eval"], "s")
        values[f"{name}_same"] = (result["same"], f"of {result['items']} decisions")
    params = next(iter(results.values()))["params"]
    save_receipt(
        "eval_speed",
        commit=args.commit,
        what="herd eval compared with lm-eval --model hf on the CPU: same items, shots, scores",
        values=values,
        seed=0,
        rivals={
            "lm-eval": package_version("lm-eval") or "",
            "transformers": package_version("transformers") or "",
        },
        notes=f"{params:,} random parameters, fp32, {args.threads} threads, 5 shots, {args.limit} items per "
        "task.",
    )


if __name__ == "__main__":
    main()
