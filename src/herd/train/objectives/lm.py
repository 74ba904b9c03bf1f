"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from ...data.batch import Batch
from ...kernels.loss import linear_cross_entropy, weight_of
from ...llama.model import LlamaLM
from .base import Loss, Objective, ObjectiveSection, count_targets


def lm(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
    """Return the next-token cross-entropy in nats over every target that is not -100."""
    total = linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_of(head), batch.targets_BT.flatten())
    return Loss(total, count_targets(batch), {})


class LmSection(ObjectiveSection):
    """Next-token prediction on running text, or on the rows of a teacher's targets without the targets."""

    kind: Literal["lm"]
    rows = frozenset({"text", "targets"})

    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        return lm
