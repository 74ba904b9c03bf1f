"""Distillation: forward KL from a live teacher on the same tokens.

Shapes: B batch rows, T time, D model dim, E the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ...data.batch import Batch
from ...errors import TrainingError
from ...kernels.loss import linear_distil, weight_of
from ...llama.model import LlamaLM
from ..section import Fraction, PositiveReal
from .base import Loss, Objective, ObjectiveSection, count_targets


class distil:
    """The objective ``kl_weight`` · tau² · KL(teacher || student) + (1 - ``kl_weight``) · cross-entropy.

    Minitron (arXiv 2407.14679, table 11): on pruned Llamas KL alone at tau 1 beats any mixture, so these are
    defaults. The teacher may have another width and depth, but must have the student's vocabulary. It runs
    without gradients, in the loop's compute dtype.
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
        return Loss(total, count_targets(batch), {"ce": ce.detach(), "kl": kl.detach()})

    def extra_flops_per_token(self, context: int) -> float:
        """Return the FLOPs per token of the teacher's forward on rows of ``context``."""
        return self.teacher.config.flops_per_token(context / 2)

    def signature(self) -> dict[str, object]:
        """Return the settings that must not change when a run is resumed."""
        return {"objective": "distil", "kl_weight": self.kl_weight, "tau": self.tau}


class DistilSection(ObjectiveSection):
    """Distillation from the checkpoint folder ``teacher``."""

    kind: Literal["distil"]
    teacher: str
    kl_weight: Fraction = 1.0
    tau: PositiveReal = 1.0
    rows = frozenset({"text", "dialogs"})

    def parents(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        return distil(load_frozen(self.teacher), kl_weight=self.kl_weight, tau=self.tau)
