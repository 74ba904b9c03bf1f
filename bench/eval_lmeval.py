"""Compare the decisions of `herd eval` with those of EleutherAI's lm-eval on transformers, item by item.

    HERD_TEST_DATA=../shared/data python bench/eval_lmeval.py

The first 200 real items of every task of the llama31 suite are put to a random model of D = 64 with Meta's
tokenizer and 8k context, in fp32. lm-eval runs its own task files and its own `hf` model. Only the rows come
from the data sets on disk, and shots are drawn by its ``first_n`` sampler. Compared per item: every
log-likelihood, which choice is best by ``acc`` and by ``acc_norm``, and whether a continuation is the greedy
one. For tasks that generate text: the text without special tokens, at most --tokens tokens to limit the time.
Finished tasks are kept in --work, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from common import DATA, ROOT, at_least, bench_parser, save_receipt
from herd.evals.local import CheckpointModel
from herd.evals.tasks import Rank
from herd.files import write_atomically
from herd.llama import ModelConfig
from herd.report.receipt import Value
from herd.text.tokenizer import Tokenizer
from lmeval import RIVALS, compare_likelihoods, open_both, oracle, random_folder

BAR = 0.999
MODEL = ModelConfig(128256, 64, 2, 4, 2, 128, rope_theta=500_000.0, max_context=8192, tie_embeddings=True)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tasks", default=",".join(oracle.LEAK))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "eval_lmeval")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    names = args.tasks.split(",")
    todo = [name for name in names if not partial(args, name).is_file()]
    if todo:
        ours, theirs = open_both(
            random_folder(args.work / "d64", MODEL, std=0.2)
        )  # large weights make choices differ
        for name in todo:
            result = compare(name, ours, theirs, args.limit, args.tokens)
            write_atomically(partial(args, name), json.dumps(result))
            print(name, {key: value for key, value in result.items() if key != "examples"}, flush=True)
    results = {name: json.loads(partial(args, name).read_text()) for name in names}
    n, same = (sum(result[key] for result in results.values()) for key in ("items", "same"))
    print(f"{same} of {n} items decided alike ({same / n:.4%})")
    receipt(results, args, n, same)


def partial(args: argparse.Namespace, name: str) -> Path:
    return args.work / f"{name}-{args.limit}-{args.tokens}.json"


def compare(name: str, ours: CheckpointModel, theirs: Any, limit: int, tokens: int) -> dict[str, Any]:
    """Count the equal decisions over the items of a task."""
    result: dict[str, Any] = {"items": 0, "same": 0, "ties": 0, "nats": 0.0, "greedy": 0, "examples": []}
    for task, herd, items in oracle.pairs(name, DATA, limit):
        if isinstance(items[0].request, Rank):
            compare_likelihoods(result, task, herd, items, ours, theirs)
        else:
            _texts(result, task, items, ours, theirs, tokens)
    return result


def _texts(
    result: dict[str, Any], task: Any, items: list, ours: CheckpointModel, theirs: Any, tokens: int
) -> None:
    from dataclasses import replace

    for instance in task.instances:
        prompt, settings = instance.args
        instance.arguments = (prompt, settings | {"max_gen_toks": tokens, "until": settings["until"]})
    texts = theirs.generate_until(task.instances, disable_tqdm=True)
    said = {instance.doc_id: text for instance, text in zip(task.instances, texts, strict=True)}
    for number, answer in ours.answer([replace(item.request, max_tokens=tokens) for item in items]):
        same = (
            without(answer.text, ours.tokenizer) == said[number]
        )  # lm-eval leaves special tokens out of its texts
        result["items"] += 1
        result["same"] += same
        if not same:
            result["examples"].append({"id": items[number].id, "ours": answer.text, "theirs": said[number]})


def without(text: str, tokenizer: Tokenizer) -> str:
    """Remove special tokens from a text. A random model writes them too."""
    for name in tokenizer.special_tokens:
        text = text.replace(name, "")
    return text


def receipt(results: dict[str, Any], args: argparse.Namespace, n: int, same: int) -> None:
    values: dict[str, Value | tuple[Any, str]] = {
        "same_decisions": at_least(BAR, same / n, "fraction"),
        "items": (n, "items"),
        "ties_among_the_different": (sum(result["ties"] for result in results.values()), "items"),
        "largest_difference": (max(result["nats"] for result in results.values()), "nats"),
        "greedy_flags_that_differ": (sum(result["greedy"] for result in results.values()), "continuations"),
    }
    values |= {
        f"same_{name}": (result["same"] / result["items"], "fraction") for name, result in results.items()
    }
    different = {name: result["examples"][:3] for name, result in results.items() if result["examples"]}
    save_receipt(
        "eval_lmeval",
        what="per-item decisions of herd eval and of lm-eval on transformers, llama31 suite, fp32",
        values=values,
        seed=0,
        rivals=RIVALS,
        notes=f"D=64 random model, Meta's tokenizer, 8k context, {args.limit} items per task (human_eval has "
        f"164); shots by the first_n sampler; written texts compared over {args.tokens} tokens. "
        + (
            f"Different: {json.dumps(different, ensure_ascii=False)[:1500]}"
            if different
            else "No difference."
        ),
    )


if __name__ == "__main__":
    main()
