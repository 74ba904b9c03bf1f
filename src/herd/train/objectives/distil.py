"""Distillation: KL divergence from a live teacher on the same tokens, or from its stored draws.

Shapes: B batch rows, T time, D model dim, E the teacher's, J words drawn for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ...data.batch import Batch
from ...errors import TrainingError
from ...kernels.loss import SampledTargets, linear_distil, linear_sampled_distil, weight_of
from ...llama.model import LlamaLM
from ..section import Fraction, PositiveReal
from .base import Loss, Objective, ObjectiveSection, count_targets


class distil:
    """The objective ``kl_weight`` · tau² · KL(teacher || student) + (1 - ``kl_weight``) · cross-entropy.

    With ``reverse`` the divergence is KL(student || teacher). Minitron (arXiv 2407.14679, table 11): on
    pruned Llamas KL alone at tau 1 beats any mixture, so these are defaults. The teacher may have another
    width and depth, but must have the student's vocabulary. It runs without gradients, in the loop's compute
    dtype.
    """

    def __init__(
        self, teacher: LlamaLM, *, kl_weight: float = 1.0, tau: float = 1.0, reverse: bool = False
    ) -> None:
        _check_weight(kl_weight)
        if not 0 < tau < float("inf"):
            raise TrainingError(f"distil: temperature tau={tau} must be positive")
        self.teacher, self.kl_weight, self.tau, self.reverse = teacher, kl_weight, tau, reverse

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
            reverse=self.reverse,
        )
        return Loss(total, count_targets(batch), {"ce": ce.detach(), "kl": kl.detach()})

    def extra_flops_per_token(self, context: int) -> float:
        """Return the FLOPs per token of the teacher's forward on rows of ``context``."""
        return self.teacher.config.flops_per_token(context / 2)

    def signature(self) -> dict[str, object]:
        """Return the settings that must not change when a run is resumed."""
        signature: dict[str, object] = {"objective": "distil", "kl_weight": self.kl_weight, "tau": self.tau}
        return signature | ({"reverse": True} if self.reverse else {})


class sampled_distil:
    """The objective of `distil` at tau 1 from a teacher's draws, which the batch carries (`data.targets`).

    Its mean over the draws is the objective of the whole distribution. No teacher runs.
    """

    def __init__(self, *, kl_weight: float = 1.0, reverse: bool = False) -> None:
        _check_weight(kl_weight)
        self.kl_weight, self.reverse = kl_weight, reverse

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
        sampled = SampledTargets(*(batch.extras[name].flatten(0, 1) for name in ("ids", "weights", "log_p")))
        total, ce, kl = linear_sampled_distil(
            hidden_BTD.flatten(0, 1),
            weight_of(head),
            batch.targets_BT.flatten(),
            sampled,
            self.kl_weight,
            reverse=self.reverse,
        )
        return Loss(total, count_targets(batch), {"ce": ce.detach(), "kl": kl.detach()})

    def signature(self) -> dict[str, object]:
        """Return the settings that must not change when a run is resumed."""
        return {"objective": "sampled_distil", "kl_weight": self.kl_weight, "reverse": self.reverse}


def _check_weight(kl_weight: float) -> None:
    if not 0 <= kl_weight <= 1:
        raise TrainingError(f"distil: kl_weight={kl_weight} must be between 0 (cross-entropy) and 1 (KL)")


Direction = Literal["forward", "reverse"]
"""Which divergence: KL(teacher || student), or KL(student || teacher)."""


class DistilSection(ObjectiveSection):
    """Distillation from the checkpoint folder ``teacher``, also on the rows of another teacher's targets."""

    kind: Literal["distil"]
    teacher: str
    kl_weight: Fraction = 1.0
    tau: PositiveReal = 1.0
    direction: Direction = "forward"
    rows = frozenset({"text", "dialogs", "targets"})

    def parents(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        reverse = self.direction == "reverse"
        return distil(load_frozen(self.teacher), kl_weight=self.kl_weight, tau=self.tau, reverse=reverse)


class SampledDistilSection(ObjectiveSection):
    """Distillation from the targets that `herd shrink label` has stored: needs data of kind ``targets``."""

    kind: Literal["sampled_distil"]
    kl_weight: Fraction = 1.0
    direction: Direction = "forward"
    rows = frozenset({"targets"})

    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        return sampled_distil(kl_weight=self.kl_weight, reverse=self.direction == "reverse")
