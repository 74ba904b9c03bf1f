"""The last two stages of `herd raise`: evaluating all models on the same held-out items, and the report.

Text, dialogs (wordings, names and numbers), needles and functions are held out from training. Every score has
a confidence interval.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..checkpoint import load_model
from ..data.dialogs import Dialog, showcase_dialogs
from ..data.shards import Shards
from ..data.wordings import LANGUAGES
from ..evals import bpb, code
from ..evals.fidelity import fidelity
from ..evals.needle import needle
from ..evals.samples import samples
from ..evals.score import Score
from ..evals.tooluse import tool_items, tool_use
from ..evals.windows import HeldOut, from_shards
from ..files import write_json
from ..llama.config import extended
from ..llama.model import LlamaLM
from ..report.page import build_page
from ..text import Tokenizer
from .data import RunData
from .live import WARMTH
from .plan import Plan
from .run import Outcome, RaiseRun

SEED = 20_240_723
"""Seed of all final items. It differs from the seed of the gates' needles."""
HELDOUT_BYTES = {"quick": 20_000, "demo": 150_000, "full": 400_000}
"""Bytes of held-out text to score, by mode: as many of running text as of parallel sentences."""
EXCERPT = 2048
"""Tokens at which a held-out document is truncated, so that a few long ones do not dominate."""
SHORTEST_NEEDLE = 256
"""Smallest tested context, in tokens. It has room for four facts."""
BASES, TALKERS = ("teacher", "long"), ("instruct", "student", "control")
MODELS = (*BASES, *TALKERS)
TEXT_PROMPTS = ("The old man", "It is", "Das ist", "Return the", "def area(", "class Point:\n   ")


def measure_models(run: RaiseRun) -> Outcome:
    """Write the scores of all models to ``scores.json``, and samples for comparison to ``samples.json``."""
    plan, data = run.plan, run.data
    tokenizer = data.tokenizer
    models = {name: load_model(run.folder / name).eval().requires_grad_(False) for name in MODELS}
    documents = heldout(data)
    filler = data.filler("heldout")
    programs = code.code_items(plan.tool_items // 4, SEED)
    records: list[dict[str, Any]] = []
    n_steps, done = 3 * len(MODELS) + 3 + len(TALKERS), 0

    def advance(what: str) -> None:
        nonlocal done
        run.show.advance(done / n_steps, what)
        done += 1

    def add(model: str, *scores: Score) -> None:
        records.extend(score.record(model) for score in scores)

    compressed = {}
    for name, model in models.items():
        advance(f"{name}: bits per byte")
        compressed[name] = bpb.compression(model, documents)
        add(name, compressed[name].score(SEED))
        advance(f"{name}: needles")
        lengths = needle_lengths(model)
        add(name, needle(model, tokenizer, filler, lengths, n=plan.needle_items, seed=SEED))
        if name in BASES[1:]:
            beyond = needle_beyond(model, tokenizer, filler, plan.needle_items)
            add(name, beyond)
        advance(f"{name}: functions")
        write = code.written_as_text if name in BASES else code.written_in_chat
        add(name, *code.program_scores(write(model, tokenizer, programs)))
    for better, other in (("student", "control"), ("long", "teacher"), ("instruct", "long")):
        add(better, bpb.compare_compression(f"bpb_vs_{other}", compressed[better], compressed[other], SEED))
    for name in ("student", "control"):
        advance(f"{name}: KL divergence from its teacher")
        add(name, *fidelity(models["instruct"], models[name], documents).scores(SEED))
    for name in ("long", *TALKERS):
        advance(f"{name}: tools")
        add(name, tool_use(models[name], tokenizer, dialogs_for(name, plan)).score())
    advance("samples")
    shown = samples(models, tokenizer, TEXT_PROMPTS, max_tokens=48, temperature=WARMTH, seed=SEED)
    asked = [list(dialog.prompt) for dialog in (*showcase_dialogs("en"), *showcase_dialogs("fr")[:2])]
    shown += samples({name: models[name] for name in TALKERS}, tokenizer, asked, max_tokens=64)
    write_json(run.folder / "scores.json", records)
    write_json(run.folder / "samples.json", shown)
    return Outcome()


def write_report(run: RaiseRun) -> Outcome:
    """Write ``report.html``, a self-contained page."""
    build_page(run.folder)
    return Outcome()


def heldout(data: RunData) -> list[HeldOut]:
    """Return the held-out documents that every model is scored on: running text, then parallel sentences."""
    budget = HELDOUT_BYTES[data.plan.mode]
    shards = data.shards_of("heldout")
    running = [kind for kind in shards if kind != "parallel"]
    chosen: list[HeldOut] = []
    for kinds in (running, [kind for kind in shards if kind == "parallel"]):
        documents = [
            document
            for kind in kinds
            for document in from_shards(shards[kind], data.tokenizer, excerpt=EXCERPT)
        ]
        order = np.random.default_rng(0).permutation(len(documents))
        sizes = np.cumsum([0, *(documents[number].n_bytes for number in order)])
        chosen += [documents[number] for number, before in zip(order, sizes, strict=False) if before < budget]
    return chosen


def needle_beyond(model: LlamaLM, tokenizer: Tokenizer, filler: Shards, n: int) -> Score:
    """Return the needles found at twice the model's context, with its rotary scaling extended, untrained."""
    longer = LlamaLM(extended(model.config, 2 * model.config.max_context)).eval()
    longer.load_state_dict(model.state_dict())
    length = longer.config.max_context
    return replace(needle(longer, tokenizer, filler, [length], n=n, seed=SEED), name="needle_beyond")


def dialogs_for(name: str, plan: Plan) -> list[Dialog]:
    """Return held-out tool dialogs, half of them in English. The instruct model is asked the most."""
    n = plan.tool_items if name == "instruct" else max(16, plan.tool_items // 4)
    others = tuple(lang for lang in LANGUAGES if lang != "en")
    return tool_items(n, SEED, languages=("en",)) + tool_items(n, SEED + 1, languages=others)


def needle_lengths(model: LlamaLM) -> list[int]:
    """Return the model's context and its halves, shortest first, down to `SHORTEST_NEEDLE`."""
    lengths, length = [], model.config.max_context
    while length >= SHORTEST_NEEDLE:
        lengths.append(length)
        length //= 2
    return lengths[::-1]
