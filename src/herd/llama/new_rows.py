"""Train the last rows of a vocabulary, for new tokens, while all other rows are frozen.

Shapes: V vocabulary, D model dim, N new rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import LlamaLM


class NewRows(nn.Module):
    """An embedding, and the head of a tied model, whose last rows are a parameter of its own."""

    old: Tensor

    def __init__(self, table_VD: Tensor, n_new: int) -> None:
        super().__init__()
        self.register_buffer("old", table_VD[:-n_new].detach().clone(), persistent=False)
        self.new_rows = nn.Parameter(table_VD[-n_new:].detach().clone())
        self.out_features, self.in_features = table_VD.shape

    @property
    def weight(self) -> Tensor:
        """The whole table (V, D). Gradients flow to the new rows."""
        return torch.cat((self.old, self.new_rows))

    def forward(self, ids: Tensor) -> Tensor:
        first = len(self.old)
        old = F.embedding(ids.clamp(max=first - 1), self.old)
        new = F.embedding((ids - first).clamp(min=0), self.new_rows)
        return torch.where((ids < first)[..., None], old, new)


class NewRowsHead(nn.Module):
    """A head that shares its table with a `NewRows` embedding, or has one of its own."""

    def __init__(self, rows: NewRows) -> None:
        super().__init__()
        self.rows = rows
        self.out_features, self.in_features = rows.out_features, rows.in_features

    @property
    def weight(self) -> Tensor:
        """See `NewRows.weight`."""
        return self.rows.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows.weight.to(x.dtype))


def train_new_rows(model: LlamaLM, n_new: int) -> LlamaLM:
    """Make the last ``n_new`` rows of embedding and head trainable, in place, and freeze the others."""
    rows = NewRows(model.model.embed_tokens.weight, n_new)
    head = rows if model.config.tie_embeddings else NewRows(model.lm_head.weight, n_new)
    model.model.embed_tokens = rows  # type: ignore[assignment]
    model.lm_head = NewRowsHead(head)  # type: ignore[assignment]
    return model
