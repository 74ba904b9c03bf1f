"""A batch: rows of tokens, the targets to predict, and the attention that tokens may pay to each other.

A batch is four aligned (B, T) tensors. Targets are already shifted: ``targets_BT[b, t]`` is the token that
follows ``tokens_BT[b, t]``, or -100 if it is not trained (prompts, padding, the last token of a packed
document). Positions and documents are None for plain rows (positions 0..T-1, one causal document). Packed
rows carry both, and attention then never crosses from one document to another (Llama 3 paper, section 3.2).

Shapes: B batch rows, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import DataError
from ..llama.attention import Attend, causal, packed

IGNORE = -100
"""The target of a token that is not trained."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward: four aligned (B, T) tensors, and further tensors that an objective needs.

    ``tokens_BT``, ``targets_BT`` and ``positions_BT`` are int64, ``documents_BT`` integers. ``extras`` are
    further tensors by name whose first dimension is B, such as a teacher's stored probabilities.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.tokens_BT.shape)
        if len(shape) != 2:
            raise DataError(f"batch tokens have shape {shape}; expected (rows, tokens)")
        for name in ("targets_BT", "positions_BT", "documents_BT"):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise DataError(f"batch {name} has shape {tuple(tensor.shape)}, tokens have {shape}")
        for name, tensor in self.extras.items():
            if tensor.shape[:1] != shape[:1]:
                raise DataError(f"batch extra {name} has shape {tuple(tensor.shape)} for {shape[0]} rows")

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.tokens_BT.shape[0]

    @property
    def n_targets(self) -> int:
        """The number of tokens that are trained."""
        return int((self.targets_BT != IGNORE).sum())

    @property
    def attend(self) -> Attend:
        """The attention of these rows: causal, or causal within each packed document."""
        return causal if self.documents_BT is None else packed(self.documents_BT)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with ``function`` applied to every tensor."""
        extras = {name: function(tensor) for name, tensor in self.extras.items()}
        positions_BT, documents_BT = (
            None if tensor is None else function(tensor) for tensor in (self.positions_BT, self.documents_BT)
        )
        return Batch(function(self.tokens_BT), function(self.targets_BT), positions_BT, documents_BT, extras)

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows ``start`` to ``stop`` as a view."""
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return self.map(lambda tensor: tensor.to(device))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join the rows of batches that carry the same tensors. Raises `DataError` if their extras differ."""
    first = batches[0]
    for batch in batches:
        if batch.extras.keys() != first.extras.keys():
            raise DataError(
                f"batches with extras {sorted(first.extras)} and {sorted(batch.extras)} cannot be joined; "
                "mix streams that carry the same tensors"
            )

    def join(tensors: Iterable[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Batch(
        torch.cat([batch.tokens_BT for batch in batches]),
        torch.cat([batch.targets_BT for batch in batches]),
        join(batch.positions_BT for batch in batches),
        join(batch.documents_BT for batch in batches),
        {name: torch.cat([batch.extras[name] for batch in batches]) for name in first.extras},
    )
