"""The base of all objectives: sums over trained tokens, from hidden states, the head and the batch.

An objective returns *sums* and the number of trained tokens. The loop divides by the number of the whole
global batch. So the gradient is the same however rows are divided into micro-batches and ranks, and a row
with few trained tokens does not weigh more than one with many, as it would in a mean of means.

The loop runs the model. An objective sees the final hidden states and the head, so that the scores of the
whole vocabulary never leave the fused loss kernel.

Shapes: B batch rows, T time, D model dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from ...data.batch import IGNORE, Batch
from ...llama.model import LlamaLM
from ..section import Section


class Loss(NamedTuple):
    """Sums over a micro-batch.

    ``total`` (an fp32 scalar with gradient) and ``metrics`` are to be divided by ``denominator``.
    """

    total: Tensor
    denominator: Tensor
    metrics: dict[str, Tensor]


Objective = Callable[[Tensor, nn.Module, Batch], Loss]
"""Maps hidden states (B, T, D), the head and the batch to a loss."""


class ObjectiveSection(Section):
    """The section ``objective`` of a recipe."""

    rows: ClassVar[frozenset[str]]
    """Kinds of rows that it reads: "text", "dialogs", "pairs"."""

    def parents(self) -> dict[str, str]:
        """Return the checkpoint folders of the other models it needs, by their role."""
        return {}

    @abstractmethod
    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        """Return the objective.

        ``load_frozen`` loads a checkpoint folder without gradients, divided over the ranks like the run's
        model.
        """


def batch_loss(model: LlamaLM, objective: Objective, batch: Batch) -> Loss:
    """Run ``model`` on ``batch`` and return the objective's loss."""
    hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.attend)
    return objective(hidden_BTD, model.lm_head, batch)


def count_targets(batch: Batch) -> Tensor:
    """Return the number of trained tokens, as a tensor on the batch's device."""
    return (batch.targets_BT != IGNORE).sum()


def signature(objective: Objective) -> dict[str, object]:
    """Return an objective's name and constants as JSON values.

    An object may have its own method of this name.
    """
    own = getattr(objective, "signature", None)
    if own is not None:
        return own()
    return {"objective": getattr(objective, "__qualname__", type(objective).__name__)}
