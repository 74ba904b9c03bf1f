"""What is minimized: functions of (model, batch), so that one loop trains everything.

An objective returns *sums* over trained tokens and their number; the loop divides by the number of tokens of the whole
global batch. So the gradient is the same however rows are cut into micro-batches and ranks, and a row with few trained
tokens does not weigh more than one with many (a mean of means would).

The model does its losses inside its own methods (`LlamaLM.loss`, `LlamaLM.distil_loss`): FSDP2 gathers parameters
around methods it knows, and the vocabulary-wide logits never leave the fused kernel.

Shapes: B batch rows, T time, E teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import IGNORE, Batch
from ..errors import TrainingError
from ..llama.model import LlamaLM


class Loss(NamedTuple):
    """Of one micro-batch: ``total`` (fp32 scalar with gradient) and ``metrics`` are sums over ``count`` tokens."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]
    metrics: dict[str, Tensor]


Objective = Callable[[LlamaLM, Batch], Loss]


def _count(batch: Batch) -> Tensor:
    return (batch.targets_BT != IGNORE).sum()


def lm(model: LlamaLM, batch: Batch) -> Loss:
    """Next-token cross-entropy in nats over every target that is not -100."""
    total = model.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.attend)
    return Loss(total, _count(batch), {})


def sft(model: LlamaLM, batch: Batch) -> Loss:
    """The same loss on dialogs: the renderer's mask has made every target -100 that the assistant did not write.

    It stands here under its own name because a state remembers what it was trained for.
    """
    return lm(model, batch)


class distil:
    """Forward KL from a live teacher on the same tokens: ``kl_weight`` · tau² · KL + (1 - ``kl_weight``) · CE.

    Minitron (arXiv 2407.14679, table 11): on pruned Llamas KL alone at tau 1 beats any mixture, so these are defaults.
    The teacher may have another width and depth; its vocabulary must be the student's. It runs without gradients, in
    the loop's compute dtype.
    """

    def __init__(self, teacher: LlamaLM, *, kl_weight: float = 1.0, tau: float = 1.0) -> None:
        if not 0 <= kl_weight <= 1:
            raise TrainingError(f"distil: kl_weight={kl_weight} must be between 0 (cross-entropy) and 1 (KL)")
        if not 0 < tau < float("inf"):
            raise TrainingError(f"distil: temperature tau={tau} must be positive")
        self.teacher, self.kl_weight, self.tau = teacher, kl_weight, tau

    def __call__(self, model: LlamaLM, batch: Batch) -> Loss:
        ours, theirs = model.config.vocab_size, self.teacher.config.vocab_size
        if ours != theirs:
            raise TrainingError(
                f"distil: the student's vocabulary is {ours}, its teacher's {theirs}; they must be one"
            )
        attend = batch.attend
        with torch.no_grad():
            teacher_BTE = self.teacher(batch.tokens_BT, batch.positions_BT, attend)
        total, ce, kl = model.distil_loss(
            batch.tokens_BT,
            batch.targets_BT,
            teacher_BTE,
            self.teacher.lm_head.weight,
            batch.positions_BT,
            attend,
            tau=self.tau,
            kl_weight=self.kl_weight,
        )
        return Loss(total, _count(batch), {"ce": ce.detach(), "kl": kl.detach()})

    def extra_flops_per_token(self, context: int) -> float:
        """The teacher's forward, charged to the run: FLOPs a token of causal rows of ``context`` tokens."""
        return self.teacher.config.flops_per_token(context / 2)

    def signature(self) -> dict[str, object]:
        """What a resumed run must have in common with the one it continues."""
        return {"objective": "distil", "kl_weight": self.kl_weight, "tau": self.tau}


def signature(objective: Objective) -> dict[str, object]:
    """An objective's name and constants, as JSON values; an object may give its own by a method of this name."""
    own = getattr(objective, "signature", None)
    return (
        own()
        if own is not None
        else {"objective": getattr(objective, "__qualname__", type(objective).__name__)}
    )
