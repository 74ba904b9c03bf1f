"""The row of `bench/shrink.py` that cuts the vocabulary, and reads the student in transformers and llama.cpp."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import DATA
from contestant import Contestant
from herd import checkpoint
from herd.distill.recovery import Arm
from herd.evals.rival import find_python
from herd.report.receipt import Value, package_version
from shrinking import SMALL_VOCAB, open_pipeline, quality, receipt, relative, valued  # fmt: skip

VOCAB_LRS = (5e-5, 1.5e-4)
"""Peak learning rates for a model that has lost only rare tokens. The better one for the loss is reported."""


def vocab_row(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    tokens = 4_096 if args.limit else 200_000 if args.tokens is None else args.tokens
    arm = Arm(f"v{SMALL_VOCAB}", pipeline.config.replace(vocab_size=SMALL_VOCAB))
    pipeline.speeds(arm.config)
    small = pipeline.tokenizer_of(SMALL_VOCAB)
    values: dict[str, Value] = {
        "parameters saved": Value(pipeline.config.n_params - arm.config.n_params, "parameters", bar="≥ 14.1 M",
                                  passed=pipeline.config.n_params - arm.config.n_params >= 14.1e6),
    }  # fmt: skip
    same = 0
    corpora = sorted([*(DATA / "debian_docs").glob("*.txt"), *(DATA / "wikitext2").glob("*.txt"),
                      DATA / "tinyshakespeare" / "input.txt"])  # fmt: skip
    for path in corpora:
        text = path.read_text(encoding="utf-8")
        same += small.decode(small.encode(text)) == text
        if path.name in ("test.txt", "handbook.en.txt", "handbook.de.txt", "handbook.ja.txt", "input.txt"):
            more = len(small.encode(text)) / len(pipeline.tokenizer.encode(text)) - 1
            english = path.name in ("test.txt", "handbook.en.txt")
            bar = {"bar": "≤ 0.05", "passed": more <= 0.05} if english else {}
            values[f"more tokens, {path.parent.name}/{path.name}"] = Value(more, "fraction", **bar)  # type: ignore[arg-type]
    values["corpora that come back byte for byte"] = Value(
        same, f"of {len(corpora)}", bar=f"= {len(corpora)}", passed=same == len(corpora)
    )
    teacher, start = pipeline.teacher_quality(pipeline.config.vocab_size), quality(pipeline.start(arm))
    values |= valued("teacher", teacher) | valued("untrained", start)
    values |= relative("bits per byte above the teacher's, untrained", start, teacher)
    folder = pipeline.cells.folder / "arms" / arm.name / "start"
    if tokens:
        arms = {lr: replace(arm, name=f"{arm.name}-lr{lr:g}", lr=lr) for lr in VOCAB_LRS}
        records = {lr: pipeline.trained(one, tokens) for lr, one in arms.items()}
        for lr, found in records.items():
            values |= relative(f"bits per byte above the teacher's, lr {lr:g}", quality(found), teacher)
        record = min(records.values(), key=lambda one: sum(one["quality"]["bits"]))
        trained = quality(record)
        values |= valued("trained", trained)
        values |= relative("bits per byte above the teacher's, trained", trained, teacher, bar=0.01)
        values["seconds of training"] = Value(record["seconds"], "s")
        folder = pipeline.cells.folder / record["model"]
    values |= elsewhere(args, folder, small)
    receipt(args, f"vocabulary of {SMALL_VOCAB:,} tokens, {tokens:,} tokens of recovery", values,
            rivals={"transformers": package_version("transformers") or ""})  # fmt: skip


def elsewhere(args: argparse.Namespace, folder: Path, tokenizer: Any) -> dict[str, Value]:
    """Compare logits and ids of a student in transformers and llama.cpp with Herd's."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (DATA / "wikitext2" / "test.txt").read_text(encoding="utf-8")[2000:6000]
    ids = tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    with torch.inference_mode():
        ours = checkpoint.load_model(folder, dtype=torch.float32).logits(torch.tensor([ids]))[0]
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    far = float((ours - hf).abs().max())
    values = {
        "ids in transformers": Value(ids == theirs, "equal", bar="equal", passed=ids == theirs),
        "largest difference of logits, transformers": Value(far, "logits", bar="≤ 0.001", passed=far <= 1e-3),
    }
    file, out = args.work / "student-f32.gguf", args.work / "logits.npy"
    checkpoint.export_gguf(folder, file, "f32")
    with Contestant([str(find_python()), str(Path(__file__).with_name("llamacpp_worker.py"))]) as llama:
        named = llama.ask({"do": "tokenize", "file": str(file), "texts": [text]})["ids"][0]
        llama.ask(
            {"do": "logits", "file": str(file), "windows": [ids], "outs": [str(out)], "threads": args.threads}
        )
    far = float((ours - torch.from_numpy(np.load(out))).abs().max())
    out.unlink()
    file.unlink()
    values["ids in llama.cpp"] = Value(named == ids, "equal", bar="equal", passed=named == ids)
    values["largest difference of logits, llama.cpp"] = Value(
        far, "logits", bar="≤ 0.001", passed=far <= 1e-3
    )
    return values
