"""How every stage of a life calls the one loop: the same few settings, live progress, samples and accounting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.batch import Batch
from ..data.stream import Stream, first_rows
from ..engine import Engine, Request, Sampling
from ..llama.model import LlamaLM
from ..text import Tokenizer
from ..train import AdamW, Cosine, TrainConfig, train
from ..train.heldout import heldout_loss
from ..train.objectives import Objective
from .plan import Phase, Plan
from .run import RaiseRun

STEP_TOKENS = 2048
"""Tokens that the plans' phases read in a step."""
SAMPLES_EVERY = 15.0
"""Seconds between live samples."""


@dataclass(frozen=True)
class Prompt:
    """What live samples continue: ``shown`` in the terminal, ``ids`` for the model."""

    shown: str
    ids: list[int]


@dataclass(frozen=True)
class Learned:
    """What a phase took: tokens trained on, FLOPs (a teacher's forwards included), seconds spent by earlier starts."""

    tokens: int
    flops: float
    earlier_seconds: float


def config_of(phase: Phase, plan: Plan) -> TrainConfig:
    """The loop's configuration: 5 % warm-up, cosine, a quarter of decay to zero whose weights are averaged."""
    decay = max(2, phase.steps // 4)
    return TrainConfig(
        steps=phase.steps,
        batch_size=phase.rows,
        context=phase.context,
        optimizer=AdamW(lr=phase.lr),
        schedule=Cosine(
            min_lr_ratio=0.3,
            warmup_steps=max(1, phase.steps // 20),
            decay_steps=decay,
            average_every=max(1, decay // 10),
        ),
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
    *,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    heldout: Sequence[Batch],
    progress: tuple[float, float] = (0.0, 1.0),
) -> Learned:
    """Train ``model`` in place through ``phase``; state and metrics live in ``stages/name``.

    ``progress``: where this phase begins and ends on its stage's bar. ``heldout`` is evaluated about twelve times.
    """
    began = time.perf_counter()
    sampler = _Sampler(run, model, tokenizer, prompts)

    def on_step(record: dict[str, Any]) -> None:
        low, high = progress
        done = low + (high - low) * record["step"] / phase.steps
        run.show.advance(done, f"loss {record['loss']:.2f}  {record['tokens_per_s']:,.0f} tokens/s")
        sampler.maybe(record["step"])

    def evaluate(now: LlamaLM, step: int) -> dict[str, float]:
        return {"loss": heldout_loss(now, heldout)}

    config = config_of(phase, run.plan)
    result = train(
        model, stream, objective, config, run.stage_folder(name), evaluate=evaluate, on_step=on_step
    )
    sampler.show(result.step)
    earlier = max(0.0, result.seconds - (time.perf_counter() - began)) if result.resumed_from else 0.0
    return Learned(result.tokens, result.flops, earlier)


def evaluation_rows(stream: Stream, rows: int) -> list[Batch]:
    """Return the first ``rows`` rows of a stream for repeated evaluation, in batches no larger than a step's."""
    return first_rows(stream, rows, max(1, STEP_TOKENS // stream.context))


class _Sampler:
    """Shows a few greedy tokens of the model in training every `SAMPLES_EVERY` seconds, prompts in turn."""

    def __init__(
        self, run: RaiseRun, model: LlamaLM, tokenizer: Tokenizer, prompts: Sequence[Prompt]
    ) -> None:
        self.run, self.model, self.tokenizer, self.prompts = run, model, tokenizer, prompts
        self.last, self.turn = time.monotonic(), 0

    def maybe(self, step: int) -> None:
        if time.monotonic() - self.last >= SAMPLES_EVERY:
            self.show(step)

    def show(self, step: int) -> None:
        prompt = self.prompts[self.turn % len(self.prompts)]
        self.turn += 1
        request = Request(prompt.ids, Sampling(max_tokens=32, temperature=0.0))
        completion = Engine(self.model, self.tokenizer, max_batch=1).run([request])[0]
        self.model.train()
        self.run.show.sample(step, prompt.shown, completion.text)
        self.last = time.monotonic()
