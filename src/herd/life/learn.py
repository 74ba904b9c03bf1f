"""How every stage of a life calls the one loop: the same small set-up, live progress, samples and accounting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.batch import Batch
from ..data.stream import Stream
from ..engine import Engine, Request, Sampling
from ..llama.model import LlamaLM
from ..text import Tokenizer
from ..train import Objective, TrainConfig, train
from .plan import Phase
from .run import Run

SAMPLES = 4
"""Live samples shown over one phase."""


@dataclass(frozen=True)
class Learned:
    """What one phase did: tokens trained on, seconds spent before this process took over, final held-out loss in nats."""

    tokens: int
    earlier_seconds: float
    heldout_loss: float


def config_of(phase: Phase, seed: int) -> TrainConfig:
    """The loop's configuration of a phase: 5 % warm-up, cosine, a fifth of annealing whose last weights are averaged."""
    anneal = max(2, phase.steps // 5)
    return TrainConfig(
        steps=phase.steps,
        batch_rows=phase.rows,
        context=phase.context,
        lr=phase.lr,
        min_lr_ratio=0.1,
        warmup_steps=max(1, phase.steps // 20),
        anneal_steps=anneal,
        average_every=max(1, anneal // 8),
        seed=seed,
        save_every=max(5, phase.steps // 20),
        eval_every=max(5, phase.steps // 10),
    )


def heldout_loss(model: LlamaLM, batches: Sequence[Batch]) -> float:
    """Mean loss in nats a token over ``batches``."""
    with torch.no_grad():
        total = sum(float(model.loss(b.tokens_BT, b.targets_BT, b.positions_BT, b.attend)) for b in batches)
    return total / sum(b.n_targets for b in batches)
