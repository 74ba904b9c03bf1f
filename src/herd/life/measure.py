"""The last two stages: every model against the same held-out items, and the page that shows it.

Nothing here is seen in training: text, dialogs (wordings, names and numbers), needles and functions are held out. Every
number carries its interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint import load_model
from ..data.dialogs import Dialog, showcase_dialogs
from ..data.wordings import LANGUAGES
from ..evals import bpb, code
from ..evals.fidelity import fidelity
from ..evals.needle import needle
from ..evals.samples import samples
from ..evals.score import Score
from ..evals.tooluse import tool_items, tool_use
from ..evals.windows import HeldOut, from_shards
from ..files import write_json
from ..llama.model import LlamaLM
from ..report.page import build_page
from .material import RaiseData
from .plan import Plan
from .run import Outcome, RaiseRun

SEED = 20_240_723
"""Of all final items; the gates' needles have another."""
HELDOUT_BYTES = {"quick": 20_000, "demo": 150_000, "full": 400_000}
"""Held-out text that is scored, of running text and of parallel sentences each."""
EXCERPT = 2048
"""Tokens of one held-out document at most, so that few long ones do not stand for all."""
SHORTEST_NEEDLE = 256
BASES, TALKERS = ("teacher", "long"), ("instruct", "student", "control")
MODELS = (*BASES, *TALKERS)
TEXT_PROMPTS = ("def area(", "import os\n\ndef ", "Return the ", "class Point:\n    ", "The sun ", "Das ist ")


def measure(run: RaiseRun) -> Outcome:
    """All scores of all models into ``scores.json``, samples side by side into ``samples.json``."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    tokenizer = material.tokenizer
    models = {name: load_model(run.folder / name).eval().requires_grad_(False) for name in MODELS}
    documents = heldout(material)
    records: list[dict[str, Any]] = []
    tick = _ticker(run, steps=3 * len(MODELS) + 3 + len(TALKERS))

    def add(model: str, *scores: Score) -> None:
        records.extend(score.record(model) for score in scores)

    compressed = {}
    for name, model in models.items():
        tick(f"{name}: bits per byte")
        compressed[name] = bpb.compression(model, documents)
        add(name, compressed[name].score(SEED))
        tick(f"{name}: needles")
        lengths = needle_lengths(model)
        add(
            name,
            needle(model, tokenizer, material.filler("heldout"), lengths, n=plan.needle_items, seed=SEED),
        )
        tick(f"{name}: functions")
        writes = code.written_as_text if name in BASES else code.written_in_chat
        add(name, *code.program_scores(writes(model, tokenizer, code.code_items(plan.tool_items // 4, SEED))))
    for better, other in (("student", "control"), ("long", "teacher"), ("instruct", "long")):
        add(better, bpb.compare_compression(f"bpb_vs_{other}", compressed[better], compressed[other], SEED))
    for name in ("student", "control"):
        tick(f"{name}: nearness to its teacher")
        add(name, *fidelity(models["instruct"], models[name], documents).scores(SEED))
    for name in ("long", *TALKERS):
        tick(f"{name}: tools")
        add(name, tool_use(models[name], tokenizer, dialogs_for(name, plan)).score())
    tick("samples")
    shown = samples(models, tokenizer, TEXT_PROMPTS, max_tokens=48)
    asked = [list(dialog.prompt) for dialog in (*showcase_dialogs("en"), *showcase_dialogs("fr")[:2])]
    shown += samples({name: models[name] for name in TALKERS}, tokenizer, asked, max_tokens=64)
    write_json(run.folder / "scores.json", records)
    write_json(run.folder / "samples.json", shown)
    return Outcome()


def report(run: RaiseRun) -> Outcome:
    """``report.html``: one self-contained page."""
    build_page(run.folder)
    return Outcome()


def heldout(material: RaiseData) -> list[HeldOut]:
    """The documents every model is scored on."""
    documents: list[HeldOut] = []
    budget = HELDOUT_BYTES[material.plan.mode]
    for name in ("heldout", "heldout-parallel"):
        shards = material.shards(name)
        if shards is not None:
            documents += from_shards(shards, material.tokenizer, max_bytes=budget, excerpt=EXCERPT)
    return documents


def dialogs_for(name: str, plan: Plan) -> list[Dialog]:
    """Held-out tool dialogs: half in English, half in the other languages; fewer for all but the instruct model."""
    n = plan.tool_items if name == "instruct" else max(16, plan.tool_items // 4)
    others = tuple(lang for lang in LANGUAGES if lang != "en")
    return tool_items(n, SEED, languages=("en",)) + tool_items(n, SEED + 1, languages=others)


def needle_lengths(model: LlamaLM) -> list[int]:
    """The model's context and its halves, down to what holds four facts."""
    lengths, length = [], model.config.max_context
    while length >= SHORTEST_NEEDLE:
        lengths.append(length)
        length //= 2
    return lengths[::-1]


def _ticker(run: RaiseRun, steps: int) -> Callable[[str], None]:
    """Moves the stage's bar on by one of ``steps`` with each call."""
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        run.show.advance(done / steps, what)
        done += 1

    return tick
