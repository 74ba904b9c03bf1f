"""Write weights as safetensors files, one tensor at a time.

The headers follow from the shapes, so they are written first. Writing needs only the memory of the largest
tensor, not of a shard or of the model. The hash of the weights is computed at the same time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dtypes import DTYPES, short_name
from ..errors import CheckpointError
from .journal import Journal
from .paths import INDEX, SINGLE
from .stream import Progress, advance_of, write_tensors
from .weights import cast_tensor, combine_digests, raw_bytes, tensor_digest

MAX_SHARD_BYTES = 5_000_000_000
Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor by name, in order."""


def write_weights(
    folder: Path,
    specs: Specs,
    get: Callable[[str], Tensor],
    *,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
    where: Path | str = "checkpoint",
    journal: Journal | None = None,
) -> str:
    """Write all tensors into ``folder`` and return the hash of the weights.

    ``get(name)`` is called once per tensor, in order, and may return any float dtype on any device. Call this
    function within `files.whole_folder`, or within `journal.new_folder` with its journal. Tensors that the
    journal counts as done are skipped. Raises `CheckpointError` if a shape is wrong or a value is beyond the
    dtype's range.
    """
    shards = _shards(specs, max_shard_bytes or MAX_SHARD_BYTES)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [SINGLE] if len(shards) == 1 else files
    digests = journal.part("written") if journal else {}
    total = sum(_nbytes(spec) for spec in specs.values())
    advance, left = advance_of(progress, total), journal.done if journal else 0

    def pieces_of(name: str) -> Iterator[Tensor]:
        data = _stored_bytes(name, get(name), *specs[name], where)
        yield data
        digests[name] = tensor_digest(name, _code(specs[name][1]), specs[name][0], data)

    for file, shard in zip(files, shards, strict=True):
        n_written = min(left, len(shard))
        left -= n_written
        sizes = {name: _nbytes(spec) for name, spec in shard.items()}
        write_tensors(
            folder / file, _header(shard), sizes, pieces_of, advance, n_written=n_written, journal=journal
        )
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return combine_digests(digests)


def _stored_bytes(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, where: Path | str
) -> Tensor:
    """Return a tensor's bytes as stored in the file: flat uint8."""
    tensor = tensor.detach().cpu()
    tensor = cast_tensor(name, tensor, dtype, where) if dtype.is_floating_point else tensor.to(dtype)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}, not {list(shape)}")
    return raw_bytes(tensor)


def _nbytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _code(dtype: torch.dtype) -> str:
    return DTYPES[short_name(dtype)].safetensors


def _shards(specs: Specs, limit: int) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Return the tensors, in order, in shards of at most ``limit`` bytes.

    A larger tensor has its own shard.
    """
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    room = limit
    for name, spec in specs.items():
        if shards[-1] and _nbytes(spec) > room:
            shards.append({})
            room = limit
        shards[-1][name] = spec
        room -= _nbytes(spec)
    return shards


def _header(shard: Specs) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in shard.items():
        stop = start + _nbytes(spec)
        header[name] = {"dtype": _code(spec[1]), "shape": list(spec[0]), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, so that mapped tensors are aligned
    return len(text).to_bytes(8, "little") + text
