"""Shrink SmolLM2-135M-Instruct and measure what its students keep, row by row.

    HERD_TEST_DATA=../shared/data python bench/shrink.py ROW [--limit] [--commit]

Each row is one command and one receipt (shrink-ROW). All rows share one folder of text, targets and students, so a
row that was interrupted continues, and targets are labelled once. Minutes are for two cores with bf16:

    vocab        25   the vocabulary cut to 24,576 tokens: size, length of texts, round trips; bits per byte untrained
                      and after 0.2 M tokens at two learning rates; the folder in transformers and in llama.cpp
    student85    50   FFN 1,216 of 1,536 neurons (84 % of the parameters without the embedding), 0.5 M tokens:
                      KL, accuracy, bits per byte and HellaSwag against the teacher
    curve       100   the planned shape of 75 % of the parameters after 0, 0.1, 0.25, 0.5 and 1.3 M tokens
    rates        15   the same shape after 50,000 tokens at four learning rates
    race        120   six shapes of 95 M parameters after 0.25 M tokens each, and controls of the best
    student75   240   the same shape after 1.3 M tokens: pruned + KD, pruned + text alone, random + KD
    student70m  150   70 M parameters after 1.3 M tokens: HellaSwag, PIQA and ARC easy, against a published model of
                      69 M parameters that was trained from scratch on 30.6 B tokens
    text        180   0.25 M tokens of prose, of what the teacher writes, and of both
    sampled      60   the student after 0.1 M tokens with 50 draws, the teacher's whole distribution, or text alone
    planted      10   a learning rate 30 times too high must be flagged
    memory       90   students for 150 MB with a cache of 8,192 tokens, against the best chosen by parameters alone
    loss          2   peak memory of the loss over 128,256 words: plain torch, fused, from stored draws
    qad          60   two trained students in Q4_0 and in Q3_K_S, rounded plainly and distilled for 0.2 M tokens in the
                      rounded weights: KL from the student itself and from the teacher
    copy          5   copying and looking up, of the teacher, the pruned and the trained student of student85
    draft        20   the student of student85 as the draft of its teacher: acceptance against 1 - TV, and speed
    chat         40   how many of 100 prompts the student of student75 answers to the end, and IFEval
    dryrun       30   the predicted time and bytes of a small run against the run itself

Training text: wikitext-2 valid, the first four fifths of the Debian handbook, the Debian reference, and nine of ten
English dialogs of oasst1. Held out: wikitext-2 test, the last fifth of the handbook, and the other dialogs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import WORK, at_most, bench_parser
from herd.checkpoint import load_model
from herd.distill.measure import Quality, difference
from herd.distill.shapes import Budget, Shape, plan_shapes, resident_nbytes
from herd.distill.shrink import PLAIN, Shrinker, rank_correlation
from herd.engine import Engine, Request, Sampling
from herd.evals.speed import weights_read
from herd.machine import cores
from herd.plan.ways import GGUF_FORMATS
from herd.report.receipt import Value
from shrink_loss import loss_row, sampled_row
from shrink_student import chat_row, copy_row, draft_row, dryrun_row, qad_row
from shrink_vocab import vocab_row
from shrinking import (
    SMALL_VOCAB,
    THREE_QUARTERS,
    hellaswag,
    open_pipeline,
    planned_arm,
    quality,
    receipt,
    relative,
    settings,
    student85_arm,
    task_scores,
    valued,
)  # fmt: skip

HELDOUT_TOKENS = 60_000


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], None]] = {
        "vocab": vocab_row, "student85": student85_row, "curve": curve_row, "rates": rates_row, "race": race_row,
        "student75": student75_row, "student70m": student70m_row, "text": text_row, "sampled": sampled_row,
        "planted": planted_row, "memory": memory_row, "loss": loss_row, "qad": qad_row, "copy": copy_row,
        "draft": draft_row, "chat": chat_row, "dryrun": dryrun_row,
    }  # fmt: skip
    parser = bench_parser(__doc__)
    parser.add_argument("row", choices=rows)
    parser.add_argument(
        "--limit", action="store_true", help="a small version: few tokens, few held-out texts"
    )
    parser.add_argument(
        "--tokens", type=int, help="another number of tokens of recovery, for rows with one number"
    )
    parser.add_argument("--heldout-tokens", type=int, default=HELDOUT_TOKENS)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--work", type=Path, default=WORK / "shrink")
    args = parser.parse_args()
    if args.limit and args.commit:
        sys.exit("--commit needs the full row: leave out --limit")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    rows[args.row](args)


# Rows -------------------------------------------------------------------------------------------------------


def student85_row(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    tokens = 4_096 if args.limit else args.tokens or 500_000
    arm = student85_arm(pipeline)
    pipeline.speeds(arm.config)
    teacher, start = pipeline.teacher_quality(pipeline.config.vocab_size), quality(pipeline.start(arm))
    record = pipeline.trained(arm, tokens)
    trained = quality(record)
    embedding = pipeline.config.vocab_size * pipeline.config.dim
    kept = (arm.config.n_params - embedding) / (pipeline.config.n_params - embedding)
    values = {"parameters without the embedding": Value(kept, "fraction", bar="≤ 0.85", passed=kept <= 0.85)}
    values |= valued("teacher", teacher) | valued("untrained", start) | valued("trained", trained)
    values |= accuracy_kept(trained, 0.95)
    values |= relative("bits per byte above the teacher's, untrained", start, teacher)
    values |= relative("bits per byte above the teacher's, trained", trained, teacher, bar=0.06)
    values["seconds of training"] = Value(record["seconds"], "s")
    values |= hellaswag(args, pipeline, arm, record, 0.92)
    receipt(args, f"FFN {arm.config.ffn_dim}, {record['tokens']:,} tokens", values)


def accuracy_kept(found: Quality, bar: float) -> dict[str, Value]:
    """Return the share of the teacher's next-token accuracy that a student has, with its bar."""
    one = found.summary()["accuracy_kept"]
    share = one["value"] or 0.0
    value = Value(share, "fraction", one["lo"], one["hi"], bar=f"≥ {bar}", passed=share >= bar)
    return {"next-token accuracy, share of the teacher's": value}


def curve_row(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    arm = planned_arm(pipeline, THREE_QUARTERS)
    pipeline.speeds(arm.config)
    start = quality(pipeline.start(arm))
    values = valued("0 tokens", start)
    before = (start.summary()["kl"]["value"]) or 1.0
    bars = {250_000: 0.40, 1_300_000: 0.30}
    for tokens in (2_048, 4_096) if args.limit else (100_000, 250_000, 500_000, 1_300_000):
        if args.tokens and tokens > args.tokens:
            break
        found = quality(pipeline.trained(arm, tokens))
        values |= valued(f"{tokens:,} tokens", found)
        kl = found.summary()["kl"]
        if tokens in bars:
            values[f"{tokens:,} tokens: kl"] = Value(
                kl["value"] or 0.0, "nats/token", kl["lo"], kl["hi"], bar=f"≤ {bars[tokens]:.2f}",
                passed=(kl["value"] or 0.0) <= bars[tokens],
            )  # fmt: skip
        values[f"{tokens:,} tokens: KL of the pruned model's"] = Value(
            (kl["value"] or 0.0) / before, "fraction"
        )
    receipt(args, f"recovery of {arm.name}, {arm.config.n_params:,} parameters, against tokens", values)


def rates_row(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    arm, tokens = planned_arm(pipeline, THREE_QUARTERS), 4_096 if args.limit else args.tokens or 50_000
    pipeline.speeds(arm.config)
    values = valued("untrained", quality(pipeline.start(arm)))
    for lr in (1e-4, 3e-4, 6e-4, 1e-3):
        found = quality(pipeline.trained(replace(arm, name=f"{arm.name}-lr{lr:g}", lr=lr), tokens))
        values |= valued(f"lr {lr:g}", found)
    receipt(args, f"{arm.name} after {tokens:,} tokens by learning rate", values)


def student75_row(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    arm, tokens = planned_arm(pipeline, THREE_QUARTERS), 4_096 if args.limit else args.tokens or 1_300_000
    pipeline.speeds(arm.config)
    teacher = pipeline.teacher_quality(pipeline.config.vocab_size)
    arms = {
        "pruned + KD": arm,
        "pruned + text alone": replace(arm, name=f"{arm.name}-text", distilled=False),
        "random + KD": replace(arm, name=f"{arm.name}-random", start="scratch"),
    }
    values = valued("teacher", teacher) | valued("untrained", quality(pipeline.start(arm)))
    found = {name: quality(pipeline.trained(one, tokens, tokens)) for name, one in arms.items()}
    for name, one in found.items():
        bar = 0.11 if one is found["pruned + KD"] else None
        values |= valued(name, one) | relative(
            f"{name}: bits per byte above the teacher's", one, teacher, bar
        )
    values |= accuracy_kept(found["pruned + KD"], 0.91)
    for name in list(found)[1:]:
        gap = difference(found["pruned + KD"], found[name])
        values[f"pruned + KD minus {name}"] = Value(
            gap["value"] or 0.0, "bits/byte", gap["lo"], gap["hi"],
            bar="interval below 0", passed=(gap["hi"] or 0.0) < 0,
        )  # fmt: skip
    values |= hellaswag(args, pipeline, arm, pipeline.trained(arm, tokens, tokens), 0.86)
    receipt(args, f"{arm.name}, {arm.config.n_params:,} parameters, {tokens:,} tokens", values)


PUBLISHED_69M = {"hellaswag": ("acc_norm", 0.261), "piqa": ("acc_norm", 0.548), "arc_easy": ("acc", 0.330)}
"""codelion/SmolLM2-70M, trained from scratch on 30.6 B tokens: lm-eval zero-shot, its model card."""


def student70m_row(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    arm, tokens = planned_arm(pipeline, 70e6), 4_096 if args.limit else args.tokens or 1_300_000
    pipeline.speeds(arm.config)
    record = pipeline.trained(arm, tokens)
    values = valued("untrained", quality(pipeline.start(arm))) | valued("trained", quality(record))
    out = pipeline.cells.folder / f"scores-{arm.name}-{tokens}"
    for (task, name), score in task_scores(
        args, pipeline.cells.folder / record["model"], out, PUBLISHED_69M
    ).items():
        metric, bar = PUBLISHED_69M[task]
        beaten = (
            {"bar": f"interval above {bar:g}", "passed": (score.lo or 0.0) > bar} if name == metric else {}
        )
        values[f"{task}, {name}"] = Value(score.value, "fraction", score.lo, score.hi, **beaten)  # type: ignore[arg-type]
    receipt(
        args, f"{arm.name}, {arm.config.n_params:,} parameters, {tokens:,} tokens", values,
        notes="The teacher was trained on 2.1 T tokens; the published model of 69 M parameters on 30.6 B.",
    )  # fmt: skip


def text_row(args: argparse.Namespace) -> None:
    """Equal tokens of three kinds of text; all are measured on the same held-out texts."""
    values: dict[str, Value] = {}
    tokens = 4_096 if args.limit else args.tokens or 250_000
    kinds: dict[str, dict[str, Any]] = {"prose": {}, "self-written": {"text": (), "dialogs": ()}, "both": {}}
    for name, changes in kinds.items():
        own = {} if name == "prose" else {"own_text": True}
        pipeline = open_pipeline(args, f"text-{name}", tokens=tokens, race_tokens=0, **changes, **own)
        arm = student85_arm(pipeline)
        pipeline.speeds(arm.config)
        values |= valued(name, quality(pipeline.trained(arm, tokens)))
    receipt(args, f"FFN 1,216 after {tokens:,} tokens by text", values)


def race_row(args: argparse.Namespace) -> None:
    tokens = 4_096 if args.limit else 250_000
    chosen = settings(
        args, to="params=95M", vocab=(49_152, SMALL_VOCAB), arms=6, tokens=0, race_tokens=tokens
    )
    folder = args.work / ("race-limit" if args.limit else "race")
    run = Shrinker(folder, chosen, lambda line: print(line, flush=True))
    best, steps = run.race()
    values: dict[str, Value] = {}
    for step in steps:
        values |= valued(step.name, step.quality)
    winner = next(step for step in steps if step.name.startswith(f"{run.arm(best).name}, "))
    for step in steps:
        if step.control:
            found = difference(winner.quality, step.quality)
            values[f"winner minus {step.name}"] = Value(
                found["value"] or 0.0, "bits/byte", found["lo"], found["hi"],
                bar="interval below 0", passed=(found["hi"] or 0.0) < 0,
            )  # fmt: skip
    arms = [step for step in steps if not step.control]
    measured = [sum(step.quality.bits) / sum(step.quality.n_bytes) for step in arms]
    predicted = [shape.loss_increase for shape in run.shapes]
    values["rank correlation of prediction and measurement"] = Value(
        rank_correlation(predicted, measured), "1"
    )
    name = best.label(run.pipeline.config)
    receipt(args, f"race of {len(arms)} shapes of 95 M parameters; the winner is {name}", values)


def planted_row(args: argparse.Namespace) -> None:
    """Distil with a learning rate 30 times too high: the ledger must say that it made things worse."""
    chosen = settings(
        args, to="params=114M", arms=1, tokens=8_192, race_tokens=0, lr=30 * 0.1 / 576, heldout_tokens=8_000
    )
    done = Shrinker(args.work / "planted", chosen, lambda line: print(line, flush=True)).run()
    flagged = bool(done.failures)
    values = {"flagged as worse": Value(flagged, "yes", bar="yes", passed=flagged)}
    for row in done.ledger["steps"]:
        values[f"{row['name']}: bits_per_byte"] = Value(row["bits_per_byte"]["value"], "bits/byte")
    receipt(args, "a learning rate 30 times too high", values, notes="; ".join(done.failures))


def memory_row(args: argparse.Namespace) -> None:
    """The winner of a race for 150 MB with a full cache of 8k, against the best student by parameters alone.

    The rival has the winner's formats of weights and cache, and the most parameters with which the most promising shape
    (`plan_shapes`) meets the budget. Both are compared in these formats after the same tokens.
    """
    tokens, raced = (4_096, 2_048) if args.limit else (250_000, 100_000)
    chosen = settings(args, to="memory=150MB,context=8k", vocab=(49_152, SMALL_VOCAB), arms=3, tokens=tokens,
                      race_tokens=raced)  # fmt: skip
    folder = args.work / ("memory-limit" if args.limit else "memory")
    run = Shrinker(folder, chosen, lambda line: print(line, flush=True))
    done = run.run()
    best, _ = run.race()
    rival = _by_parameters(run, best)
    qualities = {}
    for name, shape in (("winner", best), ("by parameters alone", rival)):
        arm = run.arm(shape)
        found = run.pipeline.start(arm) if run.is_teacher(arm) else run.pipeline.trained(arm, tokens)
        qualities[name] = quality(found)
        if shape.weights not in PLAIN:
            qualities[name] = run.quantized(arm, run.trained_folder(arm, tokens), tokens, shape.weights)
    student = folder / ("model" if best.weights in PLAIN else f"model-{best.weights}")
    values = {"weights and full cache, as allocated": at_most(150e6, _allocated(student, best.kv), "bytes")}
    for name, found in qualities.items():
        values |= valued(name, found)
    gap = difference(qualities["winner"], qualities["by parameters alone"])
    values["winner minus by parameters alone"] = Value(
        gap["value"] or 0.0, "bits/byte", gap["lo"], gap["hi"], bar="< 0", passed=(gap["value"] or 0.0) < 0
    )
    names = [f"{shape.label(run.pipeline.config)} ({shape.config.n_params:,})" for shape in (best, rival)]
    notes = f"{done.ledger['facts']['run with']}; winner {names[0]}, by parameters alone {names[1]}"
    receipt(args, "150 MB with a cache of 8,192 tokens", values, notes=notes)


def _by_parameters(run: Shrinker, best: Shape) -> Shape:
    """Return the most promising shape of the most parameters that meets the run's budget in the formats of ``best``."""
    teacher = run.pipeline.config
    budget = Budget.parse(str(run.settings.to), teacher.max_context)
    weights = next(each for each in GGUF_FORMATS if each.name == best.weights)
    for n_params in range(teacher.n_params, 0, -500_000):
        shape = plan_shapes(teacher, Budget("params", n_params), run.settings.vocab, 1)[0]
        if resident_nbytes(shape.config, weights, best.kv, budget.context) <= budget.limit:
            return replace(shape, weights=best.weights, kv=best.kv)
    raise AssertionError("plan_shapes raises PlanError before this")


def _allocated(folder: Path, kv: str) -> int:
    """Return the bytes of the weights of the model in ``folder`` and of its cache after 8,192 tokens."""
    model = load_model(folder).eval()
    engine = Engine(model, None, max_batch=1, max_context=8_192, kv=kv)
    prompt = torch.randint(0, model.config.vocab_size, (8_190,), generator=torch.Generator().manual_seed(0))
    engine.run([Request(prompt.tolist(), Sampling(max_tokens=2))])
    return weights_read(model) + engine.cache.nbytes


if __name__ == "__main__":
    main()
