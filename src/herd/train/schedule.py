"""The learning rate: linear warm-up, cosine, and a last stretch straight to zero. A pure function of the step.

Llama 3 405B: 8,000 warm-up steps to 8e-5, cosine to 8e-7 over 1,200,000 steps, then linear decay to zero, with
the checkpoints of that last stretch averaged (arXiv 2407.21783, sections 3.4.1 and 3.4.3).
"""

from __future__ import annotations

import math

from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of the update that takes the weights from ``step`` updates to ``step + 1``; ``step`` counts from 0.

    Warm-up ends exactly at the peak. The decay begins where the cosine ended and would reach zero at ``config.steps``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_from = config.steps - config.decay_steps
    if step < decay_from:
        return _cosine(step, decay_from, config)
    return _cosine(decay_from, decay_from, config) * (config.steps - step) / config.decay_steps


def _cosine(step: int, end: int, config: TrainConfig) -> float:
    """From the peak at the end of the warm-up to ``min_lr_ratio`` of it at ``end``."""
    if end <= config.warmup_steps:  # no cosine at all: the decay follows the warm-up
        return config.lr
    done = (step - config.warmup_steps) / (end - config.warmup_steps)
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def averages_at(step: int, config: TrainConfig) -> bool:
    """Whether the weights after ``step`` updates enter the mean: every ``average_every`` steps, counted back from the
    last one, inside the decay."""
    if not config.average_every or step <= config.steps - config.decay_steps:
        return False
    return (config.steps - step) % config.average_every == 0
