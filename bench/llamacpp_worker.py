"""Run llama.cpp on GGUF files; the rival's own Python, which has no Herd, runs this program.

Reads one JSON list of jobs from stdin and writes one list of answers to stdout. A job is one of

    {"do": "run", "file": PATH, "prompt": [ids], "n": 64}   -> {"ids": [...], "logits": [[...] per prompt token]}
    {"do": "tokenize", "file": PATH, "texts": [...]}        -> {"ids": [[...] per text]}
    {"do": "quantize", "file": PATH, "out": PATH, "ftype": 0}  -> {}
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def run(job: dict) -> dict:
    """Return the prompt's logits and greedy tokens; keys and values are fp32, to add no rounding."""
    prompt = job["prompt"]
    model = llama_cpp.Llama(
        job["file"],
        n_ctx=len(prompt) + job["n"] + 8,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
    )
    model.eval(prompt)
    logits = np.array(model.scores[: len(prompt)])
    ids: list[int] = []
    for _ in range(job["n"]):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval([ids[-1]])
    return {"ids": ids, "logits": logits.tolist()}


def tokenize(job: dict) -> dict:
    """Ids of plain texts, begin-of-text first."""
    model = llama_cpp.Llama(job["file"], vocab_only=True, verbose=False)
    return {"ids": [model.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"]]}


def quantize(job: dict) -> dict:
    """A file written by llama.cpp itself."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = job["ftype"], 1, job.get("pure", True)
    failed = llama_cpp.llama_model_quantize(job["file"].encode(), job["out"].encode(), params)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize {job['file']} to type {job['ftype']}")
    return {}


if __name__ == "__main__":
    answers = [
        {"run": run, "tokenize": tokenize, "quantize": quantize}[job["do"]](job)
        for job in json.load(sys.stdin)
    ]
    json.dump({"version": llama_cpp.__version__, "answers": answers}, sys.stdout)
