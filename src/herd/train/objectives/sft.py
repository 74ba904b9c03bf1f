"""Supervised fine-tuning: next-token prediction of the assistant's messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from ...data.batch import Batch
from ...llama.model import LlamaLM
from .base import Loss, Objective, ObjectiveSection
from .lm import lm


def sft(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
    """Return `lm`'s loss on dialogs, where every target that the assistant did not write is -100.

    It has a name of its own because a state records its objective.
    """
    return lm(hidden_BTD, head, batch)


class SftSection(ObjectiveSection):
    """Next-token prediction on the assistant's part of dialogs."""

    kind: Literal["sft"]
    rows = frozenset({"dialogs"})

    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        return sft
