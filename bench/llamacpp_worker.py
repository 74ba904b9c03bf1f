"""Run llama.cpp on GGUF files. Its own Python, which has no Herd, runs this program.

Reads a job from every line of stdin and writes an answer as a line to stdout. Both are JSON. Jobs:

    {"do": "version"}                                                        -> "0.3.16"
    {"do": "run", "file": PATH, "prompt": [ids], "n": 64, "out": NPY}        -> {"ids": [...]}   ("lora": an adapter)
    {"do": "logits", "file": PATH, "windows": [[ids], ...], "outs": [NPY]}   -> {}
    {"do": "tokenize", "file": PATH, "texts": [...]}                         -> {"ids": [[...] per text]}
    {"do": "chat", "file": PATH, "question": TEXT, "n": 64}                  -> {"text": ...}
    {"do": "quantize", "file": PATH, "out": PATH, "ftype": 0}                -> {}   ("imatrix": NPZ if there is one)

Logits go to the NumPy files ``out`` as fp32 (T, V), one row per token of the prompt or the window. Keys and values are
fp32, to add no rounding, unless a job has ``"kv": "f16"``, which is llama.cpp's default.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import llama_cpp
import numpy as np


def load(job: dict, context: int) -> llama_cpp.Llama:
    kind = llama_cpp.GGML_TYPE_F16 if job.get("kv") == "f16" else llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        job["file"],
        n_ctx=context,
        logits_all=True,
        verbose=False,
        n_threads=job.get("threads", 1),
        n_threads_batch=job.get("threads", 1),
        type_k=kind,
        type_v=kind,
        flash_attn=False,
        lora_path=job.get("lora"),
    )


def version(job: dict) -> str:
    return llama_cpp.__version__


def run(job: dict) -> dict:
    """Return greedy tokens. Stop tokens do not end them."""
    prompt = job["prompt"]
    model = load(job, len(prompt) + job["n"] + 8)
    model.eval(prompt)
    np.save(job["out"], model.scores[: len(prompt)])
    ids: list[int] = []
    for _ in range(job["n"]):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval([ids[-1]])
    return {"ids": ids}


def logits(job: dict) -> dict:
    """Write the logits of every window."""
    model = load(job, max(map(len, job["windows"])) + 8)
    for ids, out in zip(job["windows"], job["outs"], strict=True):
        model.reset()
        model.eval(ids)
        np.save(out, model.scores[: len(ids)])
    return {}


def tokenize(job: dict) -> dict:
    """Return the ids of plain texts, begin-of-text first where the vocabulary wants it."""
    model = llama_cpp.Llama(job["file"], vocab_only=True, verbose=False)
    return {"ids": [model.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"]]}


def chat(job: dict) -> dict:
    """Return the greedy answer to one question, asked with the file's own chat template and all defaults."""
    model = llama_cpp.Llama(job["file"], n_ctx=2048, verbose=False, n_threads=job.get("threads", 1))
    messages = [{"role": "user", "content": job["question"]}]
    answer = model.create_chat_completion(messages, temperature=0, max_tokens=job["n"], repeat_penalty=1.0)
    return {"text": answer["choices"][0]["message"]["content"]}


def quantize(job: dict) -> dict:
    """Let llama.cpp write a file itself."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = job["ftype"], 1, job.get("pure", True)
    if "imatrix" in job:  # mean squares of inputs by llama.cpp's names, as an .npz file
        columns = {name: mean.astype(np.float32) for name, mean in np.load(job["imatrix"]).items()}
        items = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
        for item, (name, mean) in zip(items, columns.items(), strict=False):
            item.name, item.size = name.encode(), len(mean)
            item.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = items
    failed = llama_cpp.llama_model_quantize(job["file"].encode(), job["out"].encode(), params)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize {job['file']} to type {job['ftype']}")
    return {}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints to stdout now and then
    jobs = {work.__name__: work for work in (version, run, logits, tokenize, chat, quantize)}
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(jobs[asked["do"]](asked)), file=answers, flush=True)
