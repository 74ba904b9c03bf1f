"""Writing weights: plan first, then stream.

Which tensor lies at which byte of which file follows from the shapes alone. So the headers are written first and the
tensors follow one at a time, asked for in order: the memory needed is that of the largest tensor, not of a shard or of
the model, and 405B can pass through a laptop. The hash of the weights is taken on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .weights import INDEX, NAMES, SINGLE, Progress, cast, combine, digest, raw_bytes

MAX_SHARD_BYTES = 5_000_000_000


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    where: Path | str = "checkpoint",
) -> str:
    """Writes all tensors into ``folder``, asking ``get`` for each once, in order; returns the hash of the weights.

    ``get(name)`` may return any float dtype on any device; only one tensor is held at a time. Call under
    `atomic.whole_folder`. Raises `CheckpointError` for a wrong shape or a value beyond ``dtype``'s range.
    """
    shards = _plan(shapes, dtype.itemsize, max_shard_bytes)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    digests: dict[str, str] = {}
    done = 0
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header(shard, dtype))
            for name, shape in shard.items():
                tensor = cast(name, get(name).detach().cpu(), dtype, where).contiguous()
                if tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        f"{where}: {name} has shape {list(tensor.shape)}, its config says {list(shape)}"
                    )
                data = raw_bytes(tensor)
                out.write(memoryview(data.numpy()))  # type: ignore[arg-type]
                digests[name] = digest(name, NAMES[dtype], shape, data)
                done += data.numel()
                if progress:
                    progress(done, total)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return combine(digests)


def _plan(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Cuts the tensors, in order, into shards of at most ``limit`` bytes (a larger tensor gets a shard of its own)."""
    if limit < 1:
        raise CheckpointError(f"max_shard_bytes={limit} must be positive")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = limit
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= nbytes
    return shards


def _header(shard: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shard.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8, so that mapped tensors are aligned
    return len(text).to_bytes(8, "little") + text
