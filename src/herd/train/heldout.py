"""The loss on held-out rows, which tells how well training generalizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.batch import Batch
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
