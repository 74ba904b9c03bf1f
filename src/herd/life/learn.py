"""One phase of training in `herd raise`: the loop's settings, live progress and samples, and the cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.batch import Batch
from ..data.stream import Stream
from ..engine import Engine, Request, Sampling
from ..llama.model import LlamaLM
from ..text import Tokenizer
from ..train import AdamW, Cosine, TrainConfig, train
from ..train.heldout import heldout_loss
from ..train.objectives import Objective
from .plan import Phase, Plan
from .run import Outcome, RaiseRun
from .show import Show

SAMPLES_EVERY = 15.0
"""Seconds between live samples."""


@dataclass(frozen=True)
class Prompt:
    """A text that live samples continue: ``shown`` in the terminal, ``ids`` for the model."""

    shown: str
    ids: list[int]


def config_of(phase: Phase, plan: Plan) -> TrainConfig:
    """Return the loop's settings: 5 % warm-up, cosine, a last quarter of decay with averaged weights."""
    decay = max(2, phase.steps // 4)
    warmup, average = max(1, phase.steps // 20), max(1, decay // 10)
    return TrainConfig(
        steps=phase.steps,
        batch_size=phase.rows,
        context=phase.context,
        optimizer=AdamW(lr=phase.lr),
        schedule=Cosine(min_lr_ratio=0.3, warmup_steps=warmup, decay_steps=decay, average_every=average),
        seed=plan.seed,
        dtype=plan.dtype,
        save_every=max(5, phase.steps // 25),
        keep_states=1,
        eval_every=max(5, phase.steps // 12),
    )


def learn(
    run: RaiseRun,
    name: str,
    model: LlamaLM,
    stream: Stream,
    objective: Objective,
    phase: Phase,
    heldout: Sequence[Batch],
    prompts: Sequence[Prompt],
    progress: tuple[float, float] = (0.0, 1.0),
) -> Outcome:
    """Train ``model`` in place for one phase and return its cost. State and metrics go to ``stages/NAME``.

    ``heldout`` is evaluated about twelve times. ``progress`` is the phase's part of the stage's progress bar.
    """
    began = time.perf_counter()
    sampler = _Sampler(run.show, model, run.data.tokenizer, prompts)

    def on_step(record: dict[str, Any]) -> None:
        low, high = progress
        done = low + (high - low) * record["step"] / phase.steps
        run.show.advance(done, f"loss {record['loss']:.2f}  {record['tokens_per_s']:,.0f} tokens/s")
        sampler.maybe(record["step"])

    def evaluate(now: LlamaLM, step: int) -> dict[str, float]:
        return {"loss": heldout_loss(now, heldout)}

    config, folder = config_of(phase, run.plan), run.stage_folder(name)
    result = train(model, stream, objective, config, folder, evaluate=evaluate, on_step=on_step)
    sampler.show_next(result.step)
    earlier = max(0.0, result.seconds - (time.perf_counter() - began)) if result.resumed_from else 0.0
    return Outcome(tokens=result.tokens, flops=result.flops, earlier_seconds=earlier)


class _Sampler:
    """Live samples: a few greedy tokens of the model in training, for one prompt after another."""

    def __init__(self, show: Show, model: LlamaLM, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
        self.terminal, self.model, self.tokenizer, self.prompts = show, model, tokenizer, prompts
        self.last, self.turn = time.monotonic(), 0

    def maybe(self, step: int) -> None:
        if time.monotonic() - self.last >= SAMPLES_EVERY:
            self.show_next(step)

    def show_next(self, step: int) -> None:
        prompt = self.prompts[self.turn % len(self.prompts)]
        self.turn += 1
        request = Request(prompt.ids, Sampling(max_tokens=32, temperature=0.0))
        completion = Engine(self.model, self.tokenizer, max_batch=1).run([request])[0]
        self.model.train()
        self.terminal.sample(step, prompt.shown, completion.text)
        self.last = time.monotonic()
