"""Fill parameters with values. Of parameters that FSDP2 shards, each rank fills its own rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWN_AT_ONCE = 1 << 22
"""Values drawn with one seed: few, so that a rank with some rows of a matrix draws little more than those."""


def normal_rows(shape: Sequence[int], seed: int, start: int, stop: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of the matrix of standard normal numbers of ``seed``."""
    n_rows, width = shape[0], math.prod(shape[1:])
    at_once = max(1, DRAWN_AT_ONCE // width)
    parts = [torch.empty(0, *shape[1:])]
    for block in range(start // at_once, -(-stop // at_once)):
        first = block * at_once
        # The generator of torch uses the low 32 bits. The factor keeps the seeds of a model's parameters and
        # blocks apart.
        generator = torch.Generator().manual_seed((seed + block * 100_003) % (1 << 63))
        rows = torch.randn((min(at_once, n_rows - first), *shape[1:]), generator=generator)
        parts.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(parts)


def own_rows(param: Tensor) -> tuple[Tensor, int]:
    """Return this rank's rows of ``param`` and the index of the first. Without FSDP2 these are all rows."""
    if not hasattr(param, "device_mesh"):
        return param, 0
    first = 0
    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_shard():  # on dimension 0, as torch.chunk divides it
            rank, size = param.device_mesh.get_local_rank(dim), param.device_mesh.size(dim)
            first = min(rank * -(-param.shape[0] // size), param.shape[0])
    return param.to_local(), first  # type: ignore[attr-defined]


def fill_parameter(param: Tensor, value: Tensor) -> None:
    """Copy the whole tensor ``value`` into ``param``, or this rank's rows of it."""
    own, first = own_rows(param)
    own.copy_(value[first : first + len(own)])


def fill_normal(param: Tensor, seed: int, std: float) -> None:
    """Fill ``param`` with normal numbers of standard deviation ``std``, the same on any number of ranks."""
    own, first = own_rows(param)
    own.copy_(normal_rows(param.shape, seed, first, first + len(own)) * std)
