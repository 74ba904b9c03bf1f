"""A ten-second test of this machine's training speed, which predicts the time of a run.

What is trained does not depend on it. Only the dtype of the matmuls does: bf16 is fast on processors with
instructions for it, and slow on all others, so the teacher is trained for a moment in both.
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
from .plan import CONTEXT, Plan, TrainingStage

STEP_TOKENS = 1024
"""Tokens of one step, as in the stages: smaller steps are slower per token."""
SECONDS = 2.0
"""Seconds of one measurement. There are four."""
OVERHEAD = 1.2
"""Time of a stage over the time of its steps: data, evaluations, samples, states."""
MEASURE_TOKENS = 900
"""Training tokens of the teacher that take as long as the final evaluation of one tool dialog."""
GATE_TOKENS = 30_000
"""Cost of one item of the needle gate, loss gate included, in training tokens of the teacher."""


def training_speed(config: ModelConfig, dtype: ComputeDtype, objective: Objective = lm) -> float:
    """Return the tokens per second of training steps of ``config`` on this machine."""
    model = LlamaLM(config).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    shape = (STEP_TOKENS // CONTEXT, CONTEXT + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
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
    return steps * STEP_TOKENS / (time.perf_counter() - began)


def predict(plan: Plan) -> Plan:
    """Return the plan with this machine's faster dtype, its speeds, and the predicted time of each stage."""
    teacher, student = plan.teacher_config, plan.student_config
    dtypes: tuple[ComputeDtype, ...] = ("fp32", "bf16")
    speeds = {dtype: training_speed(teacher, dtype) for dtype in dtypes}
    dtype = max(dtypes, key=lambda name: speeds[name])
    parent = LlamaLM(teacher).init_weights(0).requires_grad_(False)
    taught, alone = training_speed(student, dtype, distil(parent)), training_speed(student, dtype)

    def seconds(stage: TrainingStage) -> float:
        speed = {"student": taught, "control": alone}.get(stage.name, speeds[dtype])
        config = student if stage.name in ("student", "control") else teacher
        work = sum(phase.tokens * relative_cost(config, phase.context) for phase in stage.phases)
        return OVERHEAD * work / speed

    items = 4 * plan.tool_items + 10 * plan.needle_items
    predicted = {"tokenizer": 2e5 / speeds[dtype]} | {stage.name: seconds(stage) for stage in plan.training}
    predicted["long"] += GATE_TOKENS * plan.needle_items / speeds[dtype]
    predicted |= {"measure": MEASURE_TOKENS * items / speeds[dtype], "report": 1.0}
    rounded = {name: round(speed) for name, speed in speeds.items()}
    return plan.model_copy(update={"dtype": dtype, "speeds": rounded, "predicted_seconds": predicted})


def relative_cost(config: ModelConfig, context: int) -> float:
    """Return the FLOPs per token in rows of ``context`` over those in rows of the probe."""
    here, probe = (config.flops_per_token(length / 2, training=True) for length in (context, CONTEXT))
    return here / probe
