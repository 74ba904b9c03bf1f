"""Say what a tuning run will do before it starts: data, masks, template, memory, speed, minutes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import units
from ..data.tuning import AnswerPair, Example, SetAside, reasons_of
from ..evals.contamination import overlaps
from ..evals.tasks import make_task
from ..evals.tasks.data import Data
from ..machine import available_memory
from ..train import parallel
from ..train.objectives import batch_loss
from ..train.parallel import Ranks
from ..train.run import build, objective_of, prepare
from ..units import duration
from .recipe import Prepared

LONGEST = 3
"""Number of longest rows that the screen names."""


@dataclass(frozen=True)
class Preflight:
    """Facts known before a run. ``formats`` counts rows. ``overlap``: the fraction of each task's items."""

    model: str
    n_params: int
    objective: str
    method: str
    reason: str
    formats: dict[str, int]
    notes: dict[str, int]
    set_aside: list[SetAside]
    n_tokens: int
    n_trained: int
    longest: list[tuple[str, int]]
    template: str
    mask: str
    steps: int
    step_tokens: int
    context: int
    epochs: float
    lr: float
    dtype: str
    memory: int
    memory_free: int
    overlap: dict[str, float]
    tokens_per_s: float

    @property
    def seconds(self) -> float:
        """The predicted duration of the training steps."""
        return self.steps * self.step_tokens / self.tokens_per_s


def preflight(run: Prepared, tasks: Sequence[str], data: Data) -> Preflight:
    """Return the facts known before the run. Two micro-batches are run to measure the speed."""
    recipe, rows = run.recipe, _rows(run)
    sizes = sorted(((len(_ids(row)), row.where) for row in rows), reverse=True)
    trained = sum(row.n_trained if isinstance(row, Example) else sum(row.chosen.mask) for row in rows)
    n_tokens = sum(size for size, _ in sizes)
    chat = run.tokenizer.chat
    template = run.tokenizer.tool_template or run.tokenizer.chat_template or ""
    digest = hashlib.sha256(template.encode()).hexdigest()[:12]
    tests = {name: make_task(name).items(data) for name in tasks}
    texts = (run.tokenizer.decode(_ids(row)) for row in rows)
    found = overlaps(tests, texts, "the tuning data") if tests else {}
    train = recipe.train
    return Preflight(
        model=str(recipe.model.start),
        n_params=run.source.config.n_params,
        objective=recipe.objective.kind,
        method=run.choice.method,
        reason=run.choice.reason,
        formats=dict(run.data.formats),
        notes=dict(run.data.notes) | dict.fromkeys(run.notes, len(rows)),
        set_aside=run.data.set_aside,
        n_tokens=n_tokens,
        n_trained=trained,
        longest=[(where, size) for size, where in sizes[:LONGEST]],
        template=f"{chat.name if chat else 'none'}, SHA-256 {digest}",
        mask="the assistant's messages with the token that ends them; texts whole"
        if recipe.objective.kind == "sft"
        else "both answers, without the tokens that end them",
        steps=train.steps,
        step_tokens=train.tokens_per_step,
        context=train.context,
        epochs=train.steps * train.tokens_per_step / max(1, n_tokens),
        lr=recipe.optimizer.lr,
        dtype=train.dtype,
        memory=run.choice.nbytes,
        memory_free=available_memory(),
        overlap={name: overlap.share for name, overlap in found.items()},
        tokens_per_s=measure_speed(run),
    )


def measure_speed(run: Prepared) -> float:
    """Return the tokens per second of a forward and backward of the run, after one to warm up."""
    recipe = run.recipe
    _, data = prepare(recipe, run.source.config, Path(recipe.out))
    model = build(recipe, run.source.config, Ranks())
    objective = objective_of(recipe, Ranks())
    rows = recipe.train.micro_batch_size or recipe.train.batch_size
    seconds = 0.0
    with parallel.prepared(
        model, activation_checkpointing=recipe.train.activation_checkpointing, compiled=recipe.train.compile
    ):
        for count in (1, rows):
            batch = data.stream.batch(0, count).to(model.device)
            began = time.perf_counter()
            enabled = recipe.train.dtype != "fp32"
            with torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
                loss = batch_loss(model, objective, batch)
            loss.total.backward()
            seconds = time.perf_counter() - began
    return rows * recipe.train.context / seconds


def screen(preflight: Preflight) -> list[tuple[str, str]]:
    """Return the lines of the screen as (name, text)."""
    counts = ", ".join(f"{n:,} {name}" for name, n in preflight.formats.items())
    lines = [
        ("model", f"{preflight.model}, {units.si(preflight.n_params)} parameters"),
        ("data", f"rows: {counts}; {preflight.n_tokens:,} tokens, {preflight.n_trained:,} of them trained"),
        ("longest", ", ".join(f"{size:,} tokens at {where}" for where, size in preflight.longest)),
        ("set aside", _set_aside(preflight.set_aside)),
        ("trained", preflight.mask),
        ("template", preflight.template),
        ("method", f"{preflight.method}: {preflight.reason}"),
        (
            "run",
            f"{preflight.objective}, {preflight.steps:,} steps of {preflight.step_tokens:,} tokens in rows "
            f"of {preflight.context:,} ({preflight.epochs:.1f} epochs), lr {preflight.lr:g}, "
            f"{preflight.dtype}",
        ),
        ("memory", f"{units.nbytes(preflight.memory)} of {units.nbytes(preflight.memory_free)} free"),
        ("speed", f"{preflight.tokens_per_s:,.0f} tokens/s: {duration(preflight.seconds)}"),
    ]
    for name, share in preflight.overlap.items():
        text = f"{100 * share:.1f} % of {name}'s items share 13 words in a row with the data"
        lines.append(("overlap", text))
    lines += [("note", f"{text} ({n:,} rows)") for text, n in preflight.notes.items()]
    return lines


def _set_aside(rows: Sequence[SetAside]) -> str:
    if not rows:
        return "no row"
    reasons = reasons_of(rows)
    count = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
    return f"{count}: {'; '.join(reasons[:5])}" + ("; …" if len(reasons) > 5 else "")


def _rows(run: Prepared) -> Sequence[Example | AnswerPair]:
    return run.data.pairs if run.recipe.objective.kind == "dpo" else run.data.examples


def _ids(row: Example | AnswerPair) -> list[int]:
    return row.rendered.ids if isinstance(row, Example) else row.chosen.ids
