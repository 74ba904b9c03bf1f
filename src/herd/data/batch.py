"""What a stream hands to the loop: rows of tokens, what to predict, and who may see whom.

A batch is four aligned (B, T) tensors. Targets are already shifted: ``targets_BT[b, t]`` is the token that follows
``tokens_BT[b, t]``, or -100 where nothing is trained (prompts, padding, the last token of a packed document). Positions
and documents are None for plain rows (positions 0..T-1, one causal document); packed rows carry both, and attention
then never crosses from one document to the next (Llama 3 paper, section 3.2).

Shapes: B batch rows, T time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import DataError
from ..llama.attention import Attend, causal, packed

IGNORE = -100
"""The target of a token that is not trained."""


@dataclass(frozen=True)
class Batch:
    """``tokens_BT``, ``targets_BT`` int64; ``positions_BT`` int64 or None; ``documents_BT`` integers or None."""

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    documents_BT: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.tokens_BT.shape)
        if len(shape) != 2:
            raise DataError(f"batch tokens have shape {shape}; expected (rows, tokens)")
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise DataError(f"batch {field.name} has shape {tuple(tensor.shape)}, tokens have {shape}")

    def __len__(self) -> int:
        """Number of rows."""
        return self.tokens_BT.shape[0]

    @property
    def n_targets(self) -> int:
        """Number of tokens that are trained."""
        return int((self.targets_BT != IGNORE).sum())

    @property
    def attend(self) -> Attend:
        """The attention of these rows: causal, or causal within each packed document."""
        return causal if self.documents_BT is None else packed(self.documents_BT)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` up to ``stop`` as a view."""
        return Batch(*(None if t is None else t[start:stop] for t in self._tensors()))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(*(None if t is None else t.to(device) for t in self._tensors()))  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))
