"""Rows of `shrink.py` about trained students: fewer bits, copying, drafting, chatting, and the forecast."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from common import DATA
from herd.checkpoint import load_model, load_tokenizer, load_trainable, open_source, quantize_folder
from herd.distill.arms import StudentPipeline
from herd.distill.forecast import forecast
from herd.distill.measure import Quality, StudentEvaluator
from herd.distill.recovery import Arm
from herd.distill.scores import probes
from herd.distill.shrink import Shrinker
from herd.dtypes import torch_dtype
from herd.engine import Engine, Request, Sampling
from herd.engine.draft import ModelDraft
from herd.engine.generate import encode_prompt
from herd.engine.memory import n_pages
from herd.evals.bootstrap import ratio_interval
from herd.evals.harness import evaluate
from herd.evals.local import CheckpointModel
from herd.evals.score import Score
from herd.evals.speed import alternate, paired
from herd.evals.tasks import Data, make_task
from herd.quant.mixtures import named_scheme
from herd.quant.straight_through import StraightThrough
from herd.report.receipt import Value
from herd.train.recipe import Recipe
from herd.train.run import run_recipe
from shrinking import (
    FILE,
    THREE_QUARTERS,
    on_step,
    open_pipeline,
    planned_arm,
    quality,
    receipt,
    settings,
    student85_arm,
    valued,
)  # fmt: skip
from speculation import measure_acceptance

CHAT = Sampling(max_tokens=1024, temperature=0.2, top_p=0.9)
"""The sampling that SmolLM2's model card recommends."""
ENDED = 98


# Fewer bits -------------------------------------------------------------------------------------------------


def qad_row(args: argparse.Namespace) -> None:
    """The student of student85, and another one that is trained on 0.25 M tokens first.

    Three bits come in blocks of 256 weights, and rows of 576 do not divide into them: only the down projections
    of a student with 1,280 neurons are in Q3_K, its other matrices in Q4_0 (as llama.cpp stores them).
    """
    pipeline = open_pipeline(args)
    tokens = 4_096 if args.limit else args.tokens or 200_000
    even = Arm("f1280", pipeline.config.replace(ffn_dim=1280))
    values: dict[str, Value] = {}
    for arm, to, recovery in ((student85_arm(pipeline), "q4", 500_000), (even, "Q3_K_S", 250_000)):
        trained = 4_096 if args.limit else recovery
        pipeline.speeds(arm.config)
        record = pipeline.trained(arm, trained)
        values |= valued(f"{arm.name}, not quantized", quality(record))
        values |= _bits(pipeline, arm, pipeline.cells.folder / record["model"], to, trained, tokens)
    receipt(args, f"{tokens:,} tokens of distillation in rounded weights", values)


def _bits(
    pipeline: StudentPipeline, arm: Arm, source: Path, to: str, trained: int, tokens: int
) -> dict[str, Value]:
    """Return the KL divergences of a student in a format from itself and from its teacher."""
    compute, vocab = torch_dtype(pipeline.settings.dtype), arm.config.vocab_size
    documents = pipeline.material.held_out(pipeline.tokenizer_of(vocab), pipeline.settings.heldout_tokens)
    folder = pipeline.cells.folder / "arms" / arm.name
    student = load_trainable(source, compute, pipeline.device).eval()
    itself = StudentEvaluator(
        student, documents, None, pipeline.settings.context, compute, folder / f"hidden-{source.parent.name}"
    )
    found: dict[str, Quality] = {}
    rounded = folder / f"plain-{to}-{source.parent.name}"

    def plain() -> dict[str, Any]:
        quantize_folder(open_source(str(source)), rounded, named_scheme(to, arm.config))
        return {"quality": itself.measure(load_model(rounded).eval()).record()}

    def fitted() -> dict[str, Any]:
        model = load_trainable(source, torch.float32, pipeline.device).eval()
        formats = named_scheme(to, arm.config).plan(arm.config)
        with StraightThrough(dict(model.named_parameters()), formats).applied():
            return {"quality": itself.measure(model).record()}

    name, cell = f"{arm.name}-{source.parent.name}-{to}", pipeline.cells.run
    found["plain"] = quality(cell(f"{name}-plain-itself", f"rounding the student to {to}", None, plain))
    found["best grid, not trained"] = quality(
        cell(f"{name}-fitted-itself", f"fitting the grids of {to}", None, fitted)
    )
    record = pipeline.rounded(arm, source, to, tokens)
    model = pipeline.cells.folder / record["model"]

    def distilled() -> dict[str, Any]:
        return {"quality": itself.measure(load_model(model).eval()).record()}

    def from_itself() -> dict[str, Any]:
        name = record["model"].split("/")[-2].removeprefix("run-")
        recipe = yaml.safe_load((folder / f"recipe-{name}.yaml").read_text())
        recipe["objective"] = {"kind": "distil", "teacher": str(source)}
        recipe["out"] += "-from-itself"
        written, result = run_recipe(Recipe.model_validate(recipe), on_step=on_step)
        found = itself.measure(load_model(written).eval())
        return {"quality": found.record(), "seconds": result.seconds}

    def against_teacher() -> dict[str, Any]:
        return {"quality": pipeline.evaluator(vocab).measure(load_model(rounded).eval()).record()}

    found["distilled from the teacher"] = quality(
        cell(f"{name}-{tokens}-itself", "comparing it with the student", None, distilled)
    )
    found["distilled from the student"] = quality(
        cell(f"{name}-{tokens}-from-itself", "distilling it from the student", None, from_itself)
    )
    teacher = {
        "plain": quality(
            cell(f"{name}-plain-teacher", "comparing it with the teacher", None, against_teacher)
        ),
        "distilled from the teacher": quality(record),
    }
    values = {}
    for kind, one in found.items():
        values |= _kl(f"{arm.name} in {to}, {kind}: KL from the student", one)
    for kind, one in teacher.items():
        values |= _kl(f"{arm.name} in {to}, {kind}: KL from the teacher", one)
    before = found["plain"].summary()["kl"]["value"] or 0.0
    for kind in list(found)[1:]:
        left = ratio_interval(found[kind].kl, found["plain"].kl)
        barred = before >= 0.01 and kind == "distilled from the student"
        verdict = {"bar": "≥ 0.5", "passed": 1 - left.value >= 0.5} if barred else {}
        values[f"{arm.name} in {to}, {kind}: closed of the KL of plain quantization"] = Value(
            1 - left.value, "fraction", 1 - left.hi, 1 - left.lo, **verdict  # type: ignore[arg-type]
        )  # fmt: skip
    values[f"{arm.name} in {to}: bits per weight"] = Value(
        8 * (model / "model.gguf").stat().st_size / arm.config.n_params, "bits"
    )
    values[f"{arm.name} in {to}: seconds of distillation"] = Value(record["seconds"], "s")
    return values


def _kl(name: str, found: Quality) -> dict[str, Value]:
    one = found.summary()["kl"]
    return {name: Value(one["value"] or 0.0, "nats/token", one["lo"], one["hi"])}


# Looking back -----------------------------------------------------------------------------------------------


def copy_row(args: argparse.Namespace) -> None:
    """Random, different tokens, repeated, and random facts: does pruning and distillation cost looking back?"""
    pipeline = open_pipeline(args)
    tokens = 4_096 if args.limit else args.tokens or 500_000
    arm = student85_arm(pipeline)
    pipeline.speeds(arm.config)
    record = pipeline.trained(arm, tokens)
    folders = {
        "pruned": pipeline.cells.folder / "arms" / arm.name / "start",
        f"{tokens:,} tokens": pipeline.cells.folder / record["model"],
    }
    models = {"teacher": pipeline.teacher} | {
        name: load_model(folder).eval() for name, folder in folders.items()
    }
    values = {}
    for name, model in models.items():
        for what, one in probes(model, pipeline.tokenizer).items():
            values[f"{name}: {what}"] = Value(one["value"] or 0.0, "fraction", one["lo"], one["hi"])
    receipt(args, f"copying and looking up, FFN {arm.config.ffn_dim}", values)


def draft_row(args: argparse.Namespace) -> None:
    """Acceptance of sampled drafts at temperature 1, and the time of greedy answers with and without the draft."""
    pipeline = open_pipeline(args)
    arm, tokens = student85_arm(pipeline), 4_096 if args.limit else args.tokens or 500_000
    pipeline.speeds(arm.config)
    record = pipeline.trained(arm, tokens)
    source, folder = (
        pipeline.cells.folder / record["model"],
        pipeline.cells.folder / "arms" / arm.name / "draft-q4",
    )
    if not folder.exists():
        quantize_folder(open_source(str(source)), folder, named_scheme("q4", arm.config))
    n_answers, new = (12, 16) if args.limit else (600, 64)
    model, small = (load_model(path).float().eval().requires_grad_(False) for path in (FILE, folder))
    prompts = _questions(pipeline)
    requests = [
        Request(prompts[i % len(prompts)], Sampling(temperature=1.0, max_tokens=new, seed=i))
        for i in range(n_answers)
    ]
    found = measure_acceptance(model, small, pipeline.tokenizer, requests, draft_tokens=4, temperature=1.0)
    values = found.values() | _speed_up(pipeline, model, small, prompts[: 2 if args.limit else 8], new)
    values["parameters of the draft"] = Value(
        arm.config.n_params / pipeline.config.n_params, "of the teacher's"
    )
    receipt(args, f"{arm.name} in Q4_0 as the draft of its teacher, 4 draft tokens", values)


def _speed_up(
    pipeline: StudentPipeline, model: Any, small: Any, prompts: list[list[int]], new: int
) -> dict[str, Value]:
    """Return the speed of greedy answers, one at a time, with 1, 2 and 4 draft tokens, against none."""
    context = max(map(len, prompts)) + new + 1
    engines = {"plain": Engine(model, pipeline.tokenizer, max_context=context)}
    for k in (1, 2, 4):
        draft = ModelDraft(small, pipeline.tokenizer.vocab_size, n_pages(context), context, "bf16")
        engines[f"{k} draft tokens"] = Engine(
            model, pipeline.tokenizer, max_context=context, draft=draft, draft_tokens=k
        )
    answers: dict[str, list[list[int]]] = {}

    def turn(name: str) -> Any:
        def measure() -> float:
            began = time.perf_counter()
            done = [engines[name].run([Request(prompt, Sampling(max_tokens=new))])[0] for prompt in prompts]
            answers[name] = [one.ids for one in done]
            return (time.perf_counter() - began) / sum(len(one.ids) for one in done)

        return measure

    seconds = alternate({name: turn(name) for name in engines}, 3, lambda done, of: None)
    same = all(answers[name] == answers["plain"] for name in engines)
    values = {"tokens per second without a draft": Value(1 / statistics.median(seconds["plain"]), "tokens/s")}
    values["greedy answers are the same"] = Value(same, "yes", bar="yes", passed=same)
    for name in list(engines)[1:]:
        ratio, low, high = paired(seconds[name], seconds["plain"])
        values[f"speed-up, {name}"] = Value(ratio, "×", low, high)
    return values


# Chat -------------------------------------------------------------------------------------------------------


def _questions(pipeline: StudentPipeline) -> list[list[int]]:
    """Return the 175 seed tasks of Alpaca as prompts. No student was trained on them."""
    lines = (DATA / "alpaca_seed" / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [json.loads(line) for line in lines]
    texts = [f"{task['instruction']}\n\n{task['instances'][0]['input']}".strip() for task in tasks]
    prompts = [encode_prompt(pipeline.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [prompt for prompt in prompts if len(prompt) < 512]


def chat_row(args: argparse.Namespace) -> None:
    """The first 100 seed tasks of Alpaca, with at most 1,024 tokens of answer, and IFEval."""
    pipeline = open_pipeline(args)
    tokens = 4_096 if args.limit else args.tokens or 1_300_000
    arm = planned_arm(pipeline, THREE_QUARTERS)
    pipeline.speeds(arm.config)
    record = pipeline.trained(arm, tokens)
    n = 6 if args.limit else 100
    prompts = _questions(pipeline)[:n]
    values: dict[str, Value] = {}
    folders = {"teacher": Path(str(FILE)), "student": pipeline.cells.folder / record["model"]}
    for name, folder in folders.items():
        model = load_model(folder).eval()
        tokenizer = load_tokenizer(folder) or pipeline.tokenizer
        most = 64 if args.limit else 1024
        ended = sum(one.stop_id is not None for one in _answers(model, tokenizer, prompts, most))
        bar = {"bar": f"≥ {ENDED} of 100", "passed": 100 * ended >= ENDED * n} if name == "student" else {}
        values[f"{name}: ends its turn"] = Value(ended, f"of {n} prompts", **bar)  # type: ignore[arg-type]
        opened = CheckpointModel(
            model, tokenizer, name=name, hash=f"{arm.name}-{tokens}" if name == "student" else "teacher",
            mode="instruct",
        )  # fmt: skip
        out = pipeline.cells.folder / f"scores-chat-{name}-{tokens}"
        rows = evaluate(
            opened, [make_task("ifeval", 0, "instruct")], Data(DATA), out, limit=8 if args.limit else None
        )
        for score in (Score(**one) for one in rows.tasks[0].scores):
            values[f"{name}: IFEval, {score.name}"] = Value(score.value, "fraction", score.lo, score.hi)
        print(f"{name}: {ended} of {n} ended", flush=True)
    receipt(args, f"chat with {arm.name}, {arm.config.n_params:,} parameters, {tokens:,} tokens", values)


def _answers(model: Any, tokenizer: Any, prompts: list[list[int]], most: int) -> Any:
    requests = [Request(prompt, replace(CHAT, max_tokens=most, seed=i)) for i, prompt in enumerate(prompts)]
    return Engine(model, tokenizer, max_batch=16, max_context=512 + most + 1).run(requests)


# The forecast -----------------------------------------------------------------------------------------------


def dryrun_row(args: argparse.Namespace) -> None:
    """Forecast a run in a new folder, then run it. The targets' bytes are predicted from a probe of four rows."""
    tokens = 4_096 if args.limit else args.tokens or 100_000
    chosen = settings(args, to="params=101M", arms=2, tokens=tokens, race_tokens=tokens // 2, lr=1.7e-4, gguf="q4",
                      qad_tokens=tokens // 2)  # fmt: skip
    folder = args.work / f"dryrun-{int(time.time())}"
    run = Shrinker(folder, chosen, lambda line: print(line, flush=True))
    cells = forecast(run)
    before = _nbytes(folder)
    began = time.perf_counter()
    run.run()
    seconds, nbytes = time.perf_counter() - began, _nbytes(folder) - before
    predicted, bytes_predicted = sum(cell.seconds for cell in cells), sum(cell.nbytes for cell in cells)
    off, off_bytes = predicted / seconds - 1, bytes_predicted / nbytes - 1
    values = {
        "seconds": Value(seconds, "s"), "predicted seconds": Value(predicted, "s"),
        "predicted / measured time - 1": Value(off, "fraction", bar="within 0.25", passed=abs(off) <= 0.25),
        "bytes": Value(nbytes, "bytes"), "predicted bytes": Value(bytes_predicted, "bytes"),
        "predicted / written bytes - 1": Value(
            off_bytes, "fraction", bar="within 0.01", passed=abs(off_bytes) <= 0.01
        ),
    }  # fmt: skip
    receipt(args, f"--dry-run against the run: two shapes of 101 M parameters, {tokens:,} tokens", values)


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
