"""A ten-second test of this machine's training speed at each model size, used to choose a run's sizes.

Each size is trained for a moment on random tokens: forward, backward and Adam. The speed of one shape says
little about another, because small matrices run far below the peak of large ones, by a factor that differs
between machines. bf16 is fast only on processors with instructions for it. So the smallest size is trained in
fp32 and in bf16, and the run uses the faster dtype.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from ..data.batch import Batch
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..train import distil, lm
from ..train.objectives import Objective, batch_loss
from ..train.section import ComputeDtype
from .plan import CONTEXT, TIMED_MODES, Mode, Rung, Speeds, chosen, rung, student_of

ROWS = 8
"""Rows of a step."""

LADDER: tuple[Rung, ...] = ((128, 3), (192, 4), (256, 4), (384, 5), (512, 6))
"""(dim, layers) of the sizes, smallest first."""
SECONDS = 1.5
"""Seconds of one measurement. There are five to eight."""


def training_speed(config: ModelConfig, dtype: ComputeDtype, objective: Objective = lm) -> float:
    """Return the tokens per second of training steps of ``config`` on this machine."""
    model = LlamaLM(config).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (ROWS, CONTEXT + 1), generator=generator)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext():
            loss = batch_loss(model, objective, batch).total / batch.n_targets
        loss.backward()
        optimizer.step()

    step()  # the first step allocates memory
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    return steps * ROWS * CONTEXT / (time.perf_counter() - began)


def probe(vocab_size: int, mode: Mode) -> Speeds:
    """Measure size after size until one is too slow for the mode, then the student of the chosen size."""

    def config(of: Rung) -> ModelConfig:
        return rung(*of, vocab_size, CONTEXT)

    by_dtype: dict[ComputeDtype, float] = {d: training_speed(config(LADDER[0]), d) for d in ("fp32", "bf16")}
    dtype = max(by_dtype, key=lambda d: by_dtype[d])
    rungs = {LADDER[0]: by_dtype[dtype]}
    for shape in LADDER[1:]:
        if min(rungs.values()) < TIMED_MODES[mode].wanted_speed:
            break
        rungs[shape] = training_speed(config(shape), dtype)
    teacher = LlamaLM(config(chosen(rungs, mode))).init_weights(0).requires_grad_(False)
    student = student_of(teacher.config)
    taught = training_speed(student, dtype, distil(teacher))
    return Speeds(dtype, rungs, taught, training_speed(student, dtype))
