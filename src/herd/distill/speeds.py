"""The speeds of labelling and training on this machine, and the times of a shrink run predicted from them.

Both are probed for some seconds. Everything else is predicted by its FLOPs: forward passes at the speed of
labelling, training steps at the speed of training.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..data.batch import Batch
from ..data.targets import TargetBlock, TargetsSpec, append_block
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..train.config import TrainConfig
from ..train.objectives import batch_loss, sampled_distil
from .cells import ShrinkSettings
from .measure import autocast

PROBED_STEPS = 3


@dataclass(frozen=True)
class Speeds:
    """Measured FLOP/s of labelling and of training, and the bytes of a token's targets."""

    teacher: ModelConfig
    settings: ShrinkSettings
    label_flops: float
    train_flops: float
    bytes_per_token: float

    def label_seconds(self, tokens: int) -> float:
        """Return the predicted seconds of labelling."""
        return tokens * self._forward_flops(self.teacher) / self.label_flops

    def train_seconds(self, tokens: int, student: ModelConfig) -> float:
        """Return the predicted seconds of training a student on ``tokens``."""
        flops = tokens * student.flops_per_token(self.settings.context / 2, training=True)
        return flops / self.train_flops

    def measure_seconds(self, student: ModelConfig, *, first: bool = False) -> float:
        """Return the predicted seconds of measuring a student, the first time with the teacher's forward."""
        heads = 2 * 2 * self.teacher.dim * self.teacher.vocab_size
        flops = self._forward_flops(student) + heads
        flops += self._forward_flops(self.teacher) if first else 0
        return self.settings.heldout_tokens * flops / self.label_flops

    def _forward_flops(self, config: ModelConfig) -> float:
        return config.flops_per_token(self.settings.context / 2)


def probe_labelling(
    teacher: ModelConfig, batch: Batch, spec: TargetsSpec, draw: Callable[[], TargetBlock]
) -> dict[str, float]:
    """Return the FLOP/s of labelling ``batch`` by ``draw``, and the bytes of a token's targets."""
    draw()
    began = time.perf_counter()
    block = draw()
    seconds, n_tokens = time.perf_counter() - began, batch.tokens_BT.numel()
    return {
        "label_flops": n_tokens * teacher.flops_per_token(spec.context / 2) / seconds,
        "bytes_per_token": append_block(io.BytesIO(), spec, 0, block) / n_tokens,
    }


def probe_training(
    student: ModelConfig, settings: ShrinkSettings, compute: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Return the FLOP/s of a training step of a student with random weights."""
    model = LlamaLM(student).init_weights(0).to(device)
    config = TrainConfig(**settings.train_section(1), optimizer={"lr": 1e-6})  # type: ignore[arg-type]
    optimizer = config.optimizer.build(model)
    rows, context = settings.batch_size, settings.context
    tokens = torch.randint(0, student.vocab_size, (rows, context + 1))
    ids = torch.randint(0, student.vocab_size, (rows, context, 16))
    extras = {"ids": ids, "weights": torch.full(ids.shape, 1 / 16), "log_p": torch.full(ids.shape, -3.0)}
    batch = Batch(tokens[:, :-1], tokens[:, 1:], extras=extras).to(device)
    seconds = []
    for _ in range(PROBED_STEPS):
        began = time.perf_counter()
        with autocast(model, compute):
            batch_loss(model, sampled_distil(), batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    flops = tokens[:, 1:].numel() * student.flops_per_token(context / 2, training=True)
    return {"train_flops": flops / min(seconds[1:])}
