"""The loss on held-out rows, and the accuracy on fresh generated rows: how well training generalizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.batch import IGNORE, Batch
from ..llama.model import LlamaLM
from .objectives import batch_loss, lm


def heldout_loss(model: LlamaLM, batches: Sequence[Batch]) -> float:
    """Return the mean loss of ``model`` over the trained tokens of ``batches``, in nats per token."""
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for batch in (batch.to(device) for batch in batches):
            total += float(batch_loss(model, lm, batch).total)
    return total / sum(batch.n_targets for batch in batches)


def accuracy(model: LlamaLM, batches: Sequence[Batch]) -> float:
    """Return the fraction of the trained tokens of ``batches`` that ``model`` predicts as most likely."""
    device = next(model.parameters()).device
    n_right = 0
    with torch.no_grad():
        for batch in (batch.to(device) for batch in batches):
            hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.attend)
            trained_BT = batch.targets_BT != IGNORE
            logits_NV = model.lm_head(hidden_BTD[trained_BT])
            n_right += int((logits_NV.argmax(-1) == batch.targets_BT[trained_BT]).sum())
    return n_right / sum(batch.n_targets for batch in batches)
