"""What training minimizes: functions of (hidden states, head, batch), so that one loop trains everything.

An objective returns *sums* over trained tokens and their number; the loop divides by the number of the whole global
batch. So the gradient is the same however rows are cut into micro-batches and ranks, and a row with few trained tokens
does not weigh more than one with many, as it would in a mean of means.

The loop runs the model; an objective sees the final hidden states and the head, so that the scores of the whole
vocabulary never leave the fused loss kernel.

Shapes: B batch rows, T time, D model dim, E the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import IGNORE, Batch
from ..errors import TrainingError
from ..kernels.loss import linear_cross_entropy, linear_distil, weight_of
from ..llama.model import LlamaLM


class Loss(NamedTuple):
    """Sums over a micro-batch: ``total`` (fp32 scalar with gradient) and ``metrics``, to divide by ``denominator``."""

    total: Tensor
    denominator: Tensor
    metrics: dict[str, Tensor]


Objective = Callable[[Tensor, nn.Module, Batch], Loss]
"""Maps hidden states (B, T, D), the head and the batch to a loss."""


def batch_loss(model: LlamaLM, objective: Objective, batch: Batch) -> Loss:
    """Run ``model`` on ``batch`` and return the objective's loss."""
    hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.attend)
    return objective(hidden_BTD, model.lm_head, batch)


def _n_targets(batch: Batch) -> Tensor:
    return (batch.targets_BT != IGNORE).sum()


def lm(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
    """Return the next-token cross-entropy in nats over every target that is not -100."""
    total = linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_of(head), batch.targets_BT.flatten())
    return Loss(total, _n_targets(batch), {})


def sft(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
    """Return the same loss on dialogs, where every target that the assistant did not write is -100.

    It has its own name because a state remembers what it was trained for.
    """
    return lm(hidden_BTD, head, batch)


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

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
        ours, theirs = head.out_features, self.teacher.config.vocab_size
        if ours != theirs:
            raise TrainingError(
                f"distil: the student's vocabulary is {ours}, its teacher's {theirs}; they must be one"
            )
        with torch.no_grad():
            teacher_BTE = self.teacher(batch.tokens_BT, batch.positions_BT, batch.attend)
        total, ce, kl = linear_distil(
            hidden_BTD.flatten(0, 1),
            weight_of(head),
            batch.targets_BT.flatten(),
            teacher_BTE.flatten(0, 1),
            weight_of(self.teacher.lm_head),
            self.tau,
            self.kl_weight,
        )
        return Loss(total, _n_targets(batch), {"ce": ce.detach(), "kl": kl.detach()})

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
