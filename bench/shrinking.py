"""What the rows of `shrink.py` share: texts, settings, folders, and the values of a receipt."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import DATA, at_least, save_receipt
from herd.cli.eval_model import open_local
from herd.distill.arms import StudentPipeline
from herd.distill.cells import Cells, ShrinkSettings
from herd.distill.measure import Quality, difference
from herd.distill.recovery import Arm
from herd.distill.shapes import Budget, plan_shapes
from herd.dtypes import fast_dtype
from herd.evals.harness import evaluate
from herd.evals.score import Score
from herd.evals.tasks import Data, make_task
from herd.files import write_atomically
from herd.report.receipt import Value

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("bits_per_byte", "kl", "accuracy", "accuracy_kept", "same_choice")
STUDENT85 = {"ffn_dim": 1216}
RECOVERY_LR = 3e-4
"""The best of four peak learning rates for the loss of the three-quarter student (`shrink.py rates`)."""
SMALL_VOCAB = 24_576
THREE_QUARTERS = 100_880_000
"""Parameters: 75 % of the teacher's 134,515,008, rounded down."""


def receipt(args: argparse.Namespace, what: str, values: dict[str, Any], **more: Any) -> None:
    what = f"SmolLM2-135M-Instruct shrunk: {what}; {args.heldout_tokens:,} held-out tokens"
    name = f"shrink-{args.row}" + ("-untrained" if args.tokens == 0 else "")
    save_receipt(name, commit=args.commit, what=what, values=values, seed=0, **more)


# Text and settings ------------------------------------------------------------------------------------------


def texts(work: Path) -> dict[str, list[str]]:
    """Write the texts once and return their paths."""
    folder = work / "text"
    handbook = (DATA / "debian_docs" / "handbook.en.txt").read_text(encoding="utf-8")
    cut = handbook.index("\n", 4 * len(handbook) // 5)
    contents = {
        "handbook-train.txt": handbook[:cut],
        "handbook-heldout.txt": handbook[cut:],
        "dialogs.jsonl": "".join(json.dumps({"messages": found}) + "\n" for found in dialogs()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if not (folder / name).exists():
            write_atomically(folder / name, content)
    wikitext, debian = DATA / "wikitext2", DATA / "debian_docs"
    return {
        "text": [
            str(wikitext / "valid.txt"),
            str(folder / "handbook-train.txt"),
            str(debian / "debian-reference.en.txt"),
        ],
        "dialogs": [str(folder / "dialogs.jsonl")],
        "heldout": [str(wikitext / "test.txt"), str(folder / "handbook-heldout.txt")],
    }


def dialogs() -> list[list[dict[str, str]]]:
    """Return the dialogs of oasst1: from every first question, the best reply at every turn."""
    lines = (DATA / "oasst1_en" / "en-validation.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line) for line in lines]
    replies: dict[str | None, list[dict[str, Any]]] = {}
    for message in messages:
        replies.setdefault(message["parent_id"], []).append(message)
    found = []
    for root in replies[None]:
        turns, here = [root], root
        while answers := replies.get(here["message_id"]):
            here = min(answers, key=lambda one: 99 if one["rank"] is None else one["rank"])
            turns.append(here)
        turns = turns[: len(turns) // 2 * 2]  # ends with an answer
        if turns:
            roles = {"prompter": "user", "assistant": "assistant"}
            found.append([{"role": roles[turn["role"]], "content": turn["text"]} for turn in turns])
    return found


def settings(args: argparse.Namespace, **changes: Any) -> ShrinkSettings:
    own = {name: tuple(paths) for name, paths in texts(args.work).items()}
    heldout = 4_000 if args.limit else args.heldout_tokens
    fields = {"model": str(FILE), "dtype": fast_dtype(), "heldout_tokens": heldout} | own | changes
    return ShrinkSettings(**fields)  # type: ignore[arg-type]


def open_pipeline(args: argparse.Namespace, name: str = "shared", **changes: Any) -> StudentPipeline:
    """Return a folder of cells. Rows that use the same settings share one."""
    folder = args.work / (f"{name}-limit" if args.limit else f"{name}-{args.heldout_tokens}")
    return StudentPipeline(Cells(folder, settings(args, **changes), lambda line: print(line, flush=True)))


def on_step(record: dict[str, Any]) -> None:
    if record["step"] % 5 == 0:
        print(
            f"step {record['step']} loss {record['loss']:.4f} {record['tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )


def quality(record: dict[str, Any]) -> Quality:
    return Quality(**record["quality"])


def valued(name: str, found: Quality) -> dict[str, Value]:
    units = {"bits_per_byte": "bits/byte", "kl": "nats/token"}
    return {
        f"{name}: {measure}": Value(one["value"] or 0.0, units.get(measure, "fraction"), one["lo"], one["hi"])
        for measure, one in found.summary().items()
        if measure in NAMES
    }


def relative(name: str, a: Quality, b: Quality, bar: float | None = None) -> dict[str, Value]:
    """Return bits per byte of ``a`` relative to ``b``, minus 1, with its interval."""
    found, base = difference(a, b), sum(b.bits) / sum(b.n_bytes)
    value, lo, hi = ((found[key] or 0.0) / base for key in ("value", "lo", "hi"))
    verdict = {} if bar is None else {"bar": f"≤ {bar:.2f}", "passed": value <= bar}
    return {name: Value(value, "fraction", lo, hi, **verdict)}  # type: ignore[arg-type]


def student85_arm(pipeline: StudentPipeline) -> Arm:
    return Arm("f1216", pipeline.config.replace(**STUDENT85), lr=RECOVERY_LR)


def planned_arm(pipeline: StudentPipeline, params: float) -> Arm:
    """Return the most promising shape of at most ``params`` parameters, the vocabulary perhaps trimmed."""
    sizes = [pipeline.config.vocab_size, SMALL_VOCAB]
    shape = plan_shapes(pipeline.config, Budget("params", params), sizes, 1)[0]
    return Arm(shape.label(pipeline.config), shape.config, lr=RECOVERY_LR)


def task_scores(
    args: argparse.Namespace, model: str | Path, out: Path, names: Sequence[str]
) -> dict[tuple[str, str], Score]:
    """Return the scores of a model in tasks, zero-shot, by task and metric. Finished tasks are kept in ``out``.

    The teacher's file is run as it is, and students in the dtype in which they are computed and written.
    """
    opened = open_local(str(model), "base", None if model == FILE else fast_dtype())
    tasks = [make_task(name, 0, "base") for name in names]
    found = evaluate(opened, tasks, Data(DATA), out, limit=20 if args.limit else None)
    return {(row.task, one["name"]): Score(**one) for row in found.tasks for one in row.scores}


def hellaswag(
    args: argparse.Namespace, pipeline: StudentPipeline, arm: Arm, record: dict[str, Any], bar: float
) -> dict[str, Value]:
    """Return the accuracy of the teacher and of a student in HellaSwag, and their ratio with its bar."""
    small = "-limit" if args.limit else ""
    student = pipeline.cells.folder / record["model"]
    places = {
        "teacher": (FILE, args.work / f"scores-teacher{small}"),
        "trained": (student, pipeline.cells.folder / f"scores-{arm.name}-{record['tokens']}"),
    }
    found = {
        name: task_scores(args, *place, ["hellaswag"])["hellaswag", "acc_norm"]
        for name, place in places.items()
    }
    values = {
        f"{name}: HellaSwag": Value(one.value, "fraction", one.lo, one.hi) for name, one in found.items()
    }
    kept = found["trained"].value / found["teacher"].value
    return values | {"HellaSwag, share of the teacher's": at_least(bar, kept, "fraction")}
