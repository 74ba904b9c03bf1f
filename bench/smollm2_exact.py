"""Rows of `bench/smollm2.py` that compare numbers: logits and greedy tokens, and the divergence of the 4-bit file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch

from common import DATA
from herd import checkpoint
from herd.engine import Engine, Request, Sampling
from herd.evals.bootstrap import mean_interval
from herd.llama.model import LlamaLM
from herd.report.receipt import Value, package_version
from smollm2_parts import FILE, bounds, chat_ids, receipt, rival, tokenizer, unpacked_file, unpacked_folder

LOGITS_BAR, TIE = 1e-3, 1e-3
N_TOKENS, WINDOW, N_WINDOWS = 256, 512, 20
QUESTIONS = (
    "What is the capital of France?", "Write a haiku about the sea.", "Why is the sky blue?", "What is 17 + 25?",
    "Name three animals that live in Africa.", "Write a Python function that reverses a string.",
    "Who wrote Hamlet?", "Translate 'good morning' into German.", "What is photosynthesis?", "Tell me a short joke.",
)  # fmt: skip


def transformers_row(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    folder = unpacked_folder(args.work)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def theirs(prompt: list[int]) -> tuple[np.ndarray, list[int]]:
        out = other(torch.tensor([prompt]), use_cache=True)
        first, ids = out.logits[0].numpy(), list[int]()
        while True:
            ids.append(int(out.logits[0, -1].argmax()))
            if len(ids) == N_TOKENS:
                return first, ids
            out = other(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)

    values = compare_prompts(checkpoint.load_model(folder), theirs, args.limit)
    receipt(
        args, "the unpacked fp32 weights in Herd and in transformers", values,
        rivals={"transformers": package_version("transformers") or ""},
    )  # fmt: skip


def llamacpp_row(args: argparse.Namespace) -> None:
    file, out = unpacked_file(args.work), args.work / "logits.npy"
    with rival() as llama:

        def theirs(prompt: list[int]) -> tuple[np.ndarray, list[int]]:
            job = {"do": "run", "file": str(file), "prompt": prompt, "n": N_TOKENS, "out": str(out)}
            ids = llama.ask({**job, "threads": args.threads})["ids"]
            return np.load(out), ids

        version = llama.ask({"do": "version"})
        values = compare_prompts(checkpoint.load_model(file), theirs, args.limit)
    out.unlink()
    receipt(
        args, "an F32 unpack in Herd and in llama.cpp", values, rivals={"llama-cpp-python": version},
        notes="llama.cpp keeps keys and values in fp32 here, as Herd does",
    )  # fmt: skip


def compare_prompts(
    model: LlamaLM, theirs: Callable[[list[int]], tuple[np.ndarray, list[int]]], limit: int | None
) -> dict[str, Value]:
    """Compare logits of the prompts and greedy tokens with what ``theirs`` returns for each prompt."""
    far, equal, least, bad = 0.0, 0, N_TOKENS, 0
    several = prompts(limit)
    for number, prompt in enumerate(several):
        their_logits, their_ids = theirs(prompt)
        far = max(far, float(np.abs(logits(model, prompt) - their_logits).max()))
        ids = greedy(model, prompt, N_TOKENS)
        same = next(
            (n for n, pair in enumerate(zip(ids, their_ids, strict=True)) if pair[0] != pair[1]), N_TOKENS
        )
        if same < N_TOKENS:
            last = logits(model, prompt + ids[:same])[-1]
            gap = abs(float(last[ids[same]] - last[their_ids[same]]))
            bad += gap >= TIE
            print(
                f"prompt {number}: tokens differ after {same}, where the two are {gap:.2g} apart", flush=True
            )
        equal, least = equal + (same == N_TOKENS), min(least, same)
        print(f"prompt {number + 1} of {len(several)}: logits at most {far:.2g} apart so far", flush=True)
    return {
        "largest difference of logits": Value(
            far, "logits", bar=f"≤ {LOGITS_BAR:g}", passed=far <= LOGITS_BAR
        ),
        "prompts whose tokens differ without a near-tie": Value(bad, "prompts", bar="= 0", passed=bad == 0),
        f"prompts with {N_TOKENS} equal tokens": Value(equal, f"of {len(several)}"),
        "fewest equal tokens of a prompt": Value(least, "tokens"),
    }


def kl_row(args: argparse.Namespace) -> None:
    """All sides read the same windows. Keys and values are fp32, so that only the products' rounding is compared."""
    ids = tokenizer().encode(wikitext()[:200_000])
    windows = [ids[n * WINDOW : (n + 1) * WINDOW] for n in range(args.limit or N_WINDOWS)]
    exact, packed = checkpoint.load_model(unpacked_folder(args.work)), checkpoint.load_model(FILE)
    found: dict[str, list[np.ndarray]] = {"herd": [], "llama.cpp": [], "llama.cpp, f16 cache": []}
    out = args.work / "window.npy"
    with rival() as llama:
        version = llama.ask({"do": "version"})
        for number, window in enumerate(windows):
            reference = log_probs(logits(exact, window))
            found["herd"].append(divergence(reference, logits(packed, window)))
            for name, kind in (("llama.cpp", "f32"), ("llama.cpp, f16 cache", "f16")):
                job = {"do": "logits", "file": str(FILE), "windows": [window], "outs": [str(out)], "kv": kind}
                llama.ask({**job, "threads": args.threads})
                found[name].append(divergence(reference, np.load(out)))
            so_far = {
                name: float(f"{np.mean([part[0] for part in parts]):.4g}") for name, parts in found.items()
            }
            print(f"window {number + 1} of {len(windows)}: mean KL {so_far}", flush=True)
    out.unlink()
    values = {}
    for name, parts in found.items():
        kl, same = np.concatenate(parts, axis=1)
        interval = mean_interval([float(part[0].mean()) for part in parts])
        values[f"KL, {name}"] = Value(float(kl.mean()), "nats/token", *bounds(interval.lo, interval.hi))
        values[f"KL at the 99th percentile, {name}"] = Value(float(np.quantile(kl, 0.99)), "nats")
        values[f"same first choice, {name}"] = Value(float(same.mean()), "fraction")
    ratio = float(values["KL, herd"].value) / float(values["KL, llama.cpp"].value)
    values["KL, herd / llama.cpp"] = Value(ratio, "×", bar="≤ 1", passed=ratio <= 1)
    receipt(
        args, f"the file as downloaded compared with its unpacked weights, {len(windows) * WINDOW:,} tokens",
        values, rivals={"llama-cpp-python": version},
        notes=f"wikitext2 test in windows of {WINDOW} tokens, every place scored; the bar compares both with keys and "
        "values in fp32; f16 is llama.cpp's default",
    )  # fmt: skip


def log_probs(logits_TV: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(logits_TV).log_softmax(-1)


def divergence(reference_TV: torch.Tensor, logits_TV: np.ndarray) -> np.ndarray:
    """Return KL(reference || other) in nats, and whether both have the same first choice: (2, T)."""
    other_TV = log_probs(logits_TV)
    kl_T = (reference_TV.exp() * (reference_TV - other_TV)).sum(-1)
    same_T = (reference_TV.argmax(-1) == other_TV.argmax(-1)).float()
    return torch.stack((kl_T.clamp(min=0), same_T)).numpy()  # rounding may fall below zero


def prompts(limit: int | None) -> list[list[int]]:
    """Return ten questions in the chat format and ten beginnings of articles, in turns."""
    articles = [text for text in wikitext().split("\n") if len(text) > 400][:: max(1, len(QUESTIONS))]
    pairs = zip(QUESTIONS, articles, strict=False)
    both = [ids for question, text in pairs for ids in (chat_ids(question), tokenizer().encode(text)[:64])]
    return both[:limit]


def wikitext() -> str:
    return (DATA / "wikitext2" / "test.txt").read_text(encoding="utf-8")


@torch.inference_mode()
def logits(model: LlamaLM, ids: Sequence[int]) -> np.ndarray:
    """Return the logits of all places (T, V) in fp32."""
    return model.logits(torch.tensor([list(ids)]))[0].float().numpy()


def greedy(model: LlamaLM, prompt: list[int], n: int) -> list[int]:
    """Return greedy tokens from the engine. Stop tokens do not end them."""
    return Engine(model, None).run([Request(prompt, Sampling(max_tokens=n))])[0].ids
