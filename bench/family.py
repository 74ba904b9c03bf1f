"""Score finished families of `herd raise` on enough items to judge a recipe, one run per seed.

    python bench/family.py runs/seed0 runs/seed1 runs/seed2      # about 10 minutes a run on two cores

The items have fixed seeds that no training and no gate uses: English tool dialogs, dialogs in the other seven
languages, hidden facts at the trained length and at twice that length, fresh rows to copy, the held-out text
of the run, and twenty questions (family_questions.yaml). Each figure is the mean over the runs. Every run's
own figures are printed and stored. The bars are in family_bars.py: mean ≥ bar, and no run below bar - 5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common import bench_parser, save_receipt
from family_bars import judged
from herd.checkpoint import load_model
from herd.data.copying import CopyStream
from herd.data.dialogs import Dialog
from herd.data.prompts import system_prompt
from herd.data.scoring import states
from herd.data.stream import first_rows
from herd.data.wordings import LANGUAGES
from herd.engine.engine import Engine
from herd.evals.bootstrap import paired_difference
from herd.evals.bpb import compare_compression, compression
from herd.evals.needle import needle
from herd.evals.tooluse import answer_dialogs, tool_items, tool_use
from herd.files import write_json
from herd.life.data import RunData
from herd.life.measure import heldout, needle_beyond
from herd.life.run import RaiseRun
from herd.llama.model import LlamaLM
from herd.report.receipt import Value
from herd.train.heldout import accuracy

SEED = 31_415_926
"""Seed of all items here."""
ENGLISH, OTHERS, NEEDLES, COPY_ROWS, PAIRED = 480, 420, 400, 400, 400
"""Numbers of items: English dialogs, dialogs in other languages, needles, rows to copy, compared dialogs."""
DECLINED = re.compile(r"\b(cannot|can't|do not know|don't know|have no|unable|only write|too small)\b", re.I)


def score_run(folder: Path) -> dict[str, Any]:
    """Return the figures of one run. They are kept in its folder, so that a second call only reads them."""
    kept = folder / "bench-family.json"
    if kept.exists():
        return json.loads(kept.read_text())
    plan = RaiseRun.saved_plan(folder)
    data = RunData(plan, folder)
    names = ("teacher", "long", "instruct", "student", "control")
    models = {name: load_model(folder / name).eval().requires_grad_(False) for name in names}
    instruct, tokenizer, filler = models["instruct"], data.tokenizer, data.filler("heldout")
    other_languages = tuple(lang for lang in LANGUAGES if lang != "en")
    english = tool_use(instruct, tokenizer, tool_items(ENGLISH, SEED, languages=("en",))).score()
    others = tool_use(instruct, tokenizer, tool_items(OTHERS, SEED + 1, languages=other_languages)).score()
    forms, languages = english.detail["by_form"], others.detail["by_lang"]
    length = models["long"].config.max_context
    found = {
        name: needle(models[name], tokenizer, filler, [length], n=NEEDLES, seed=SEED).value
        for name in ("long", "instruct", "student", "control")
    }
    rows = first_rows(CopyStream(tokenizer.n_ordinary, plan.teacher_config.max_context, SEED), COPY_ROWS, 16)
    documents = heldout(data)
    bits = {name: compression(model, documents) for name, model in models.items()}
    inside, outside, transcript = ask_questions(instruct, tokenizer)
    figures: dict[str, Any] = {
        "seed": plan.seed,
        "dtype": plan.dtype,
        "tools_en": english.value,
        "tools_worst_language": min(part["value"] for part in languages.values()),
        "tools_worst_form": min(part["value"] for part in forms.values()),
        **{f"tools_{lang}": part["value"] for lang, part in languages.items()},
        **{f"tools_{form}": part["value"] for form, part in forms.items()},
        "needle_length": length,
        "needle": found["long"],
        **{f"needle_{name}": value for name, value in found.items() if name != "long"},
        "needle_beyond": needle_beyond(models["long"], tokenizer, filler, NEEDLES).value,
        "copying": accuracy(models["teacher"], rows),
        **{f"bpb_{name}": score.score(SEED).value for name, score in bits.items()},
        **compared(models, bits, tokenizer),
        "inside": inside,
        "outside": outside,
        **times(folder, plan.predicted_seconds),
        "transcript": transcript,
    }
    write_json(kept, figures)
    return figures


def compared(models: dict[str, LlamaLM], bits: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return student minus control in text and in tools, each with its interval."""
    text = compare_compression("bpb", bits["student"], bits["control"], SEED)
    items = tool_items(PAIRED, SEED + 2)
    hits = [
        [float(verdict.correct) for verdict in tool_use(models[name], tokenizer, items).verdicts]
        for name in ("student", "control")
    ]
    tools = paired_difference(hits[0], hits[1], seed=0)
    return {
        "student_minus_control_bpb": [text.value, text.lo, text.hi],
        "student_minus_control_tools": [tools.value, tools.lo, tools.hi],
        "tools_student": float(np.mean(hits[0])),
        "tools_control": float(np.mean(hits[1])),
    }


def ask_questions(model: LlamaLM, tokenizer: Any) -> tuple[float, float, list[dict[str, Any]]]:
    """Ask the twenty questions. Return the fractions of right answers inside and outside, and a transcript."""
    questions = yaml.safe_load(Path(__file__).with_name("family_questions.yaml").read_text())
    asked = [(kind, question) for kind in ("inside", "outside") for question in questions[kind]]
    system = {"role": "system", "content": system_prompt("json")}
    dialogs = [
        Dialog((system, {"role": "user", "content": question["question"]}), "json", "en", "", "", "")
        for _, question in asked
    ]
    answered = answer_dialogs(Engine(model, tokenizer, max_batch=32), tokenizer, dialogs)
    right: dict[str, list[bool]] = {"inside": [], "outside": []}
    transcript = []
    for (kind, question), of in zip(asked, answered, strict=True):
        calls = [call for message in of.produced for call in message.get("tool_calls") or ()]
        text = str(of.produced[-1].get("content") or "")
        if kind == "inside":
            good = states(text, question["answer"]) and bool(calls) == question["call"]
        else:
            good = not calls and bool(DECLINED.search(text))
        right[kind].append(good)
        shown = {"question": question["question"], "calls": [call.get("arguments") for call in calls]}
        transcript.append(shown | {"answer": text, "right": good})
    return float(np.mean(right["inside"])), float(np.mean(right["outside"])), transcript


def times(folder: Path, predicted: dict[str, float]) -> dict[str, float]:
    """Return the seconds of all stages, and the predicted seconds over them."""
    records = [json.loads(path.read_text()) for path in (folder / "stages").glob("*/stage.json")]
    seconds = sum(record["seconds"] for record in records)
    return {"seconds": seconds, "predicted_over_measured": sum(predicted.values()) / seconds}


def mean_value(key: str, runs: Sequence[dict[str, Any]]) -> Value:
    """Return the mean of a figure over the runs, with the lowest and the highest run, and its verdict."""
    values = [run[key] for run in runs]
    return judged(key, float(np.mean(values)), min(values), max(values))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--name", default="family", help="Name of the receipt.")
    options = parser.parse_args()
    runs = []
    for folder in options.runs:
        runs.append(score_run(folder))
        print(folder, json.dumps(runs[-1], ensure_ascii=False, indent=1), flush=True)
    keys = [key for key, value in runs[0].items() if isinstance(value, float)]
    values = {key: mean_value(key, runs) for key in keys}
    for key in ("student_minus_control_bpb", "student_minus_control_tools"):
        worst = [run[key] for run in runs]
        ahead = all(hi < 0 for _, _, hi in worst) if "bpb" in key else all(lo > 0 for _, lo, _ in worst)
        mean = float(np.mean([value for value, _, _ in worst]))
        low, high = min(lo for _, lo, _ in worst), max(hi for _, _, hi in worst)
        values[key] = Value(
            mean, "bits/byte" if "bpb" in key else "fraction", low, high, "ahead in every run", ahead
        )
    seeds = ", ".join(str(run["seed"]) for run in runs)
    save_receipt(
        options.name,
        what=f"families of `herd raise`, seeds {seeds}: mean, with the lowest and the highest run",
        values=values,
        seed=SEED,
        notes=f"matmuls in {', '.join(sorted({run['dtype'] for run in runs}))}",
    )


if __name__ == "__main__":
    main()
