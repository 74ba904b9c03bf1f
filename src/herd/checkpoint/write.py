"""Writing weights: plan first, then stream.

Which tensor lies at which byte of which file follows from the shapes alone. So the headers are written first and the
tensors follow one at a time, asked for in order: the memory needed is that of the largest tensor, not of a shard or of
the model, and 405B can pass through a laptop. The hash of the weights is taken on the way.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .journal import Journal
from .weights import INDEX, NAMES, SINGLE, Progress, cast_tensor, combine_digests, raw_bytes, tensor_digest

MAX_SHARD_BYTES = 5_000_000_000
Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor by name, in order."""
_NAMES = NAMES | {torch.int32: "I32", torch.int64: "I64"}


def write_weights(
    folder: Path,
    specs: Specs,
    get: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    where: Path | str = "checkpoint",
    journal: Journal | None = None,
) -> str:
    """Writes all tensors into ``folder``, asking ``get`` for each once, in order; returns the hash of the weights.

    ``get(name)`` may return any float dtype on any device; only one tensor is held at a time. Call under
    `atomic.whole_folder`, or under `journal.resumable_folder` with its journal: what that says is done is not asked for
    again. Raises `CheckpointError` for a wrong shape or a value beyond the dtype's range.
    """
    shards = _plan(specs, max_shard_bytes)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    digests = journal.part("written") if journal else {}
    total, done, left = sum(_nbytes(specs[name]) for name in specs), 0, journal.done if journal else 0
    for file, shard in zip(files, shards, strict=True):
        header = _header(shard)
        known = list(shard)[:left]  # tensors of this shard that an earlier run has written
        left -= len(known)
        start = sum(_nbytes(shard[name]) for name in known)
        done += start
        if progress and known:
            progress(done, total)
        with (folder / file).open("r+b" if known else "wb") as out:
            if known:
                out.truncate(len(header) + start)
                out.seek(0, os.SEEK_END)
            else:
                out.write(header)
            for name in list(shard)[len(known) :]:
                data = _whole(name, get(name), *shard[name], where)
                out.write(memoryview(data.numpy()))  # type: ignore[arg-type]
                digests[name] = tensor_digest(name, _NAMES[shard[name][1]], shard[name][0], data)
                done += data.numel()
                if journal:
                    journal.add(data.numel(), out)
                if progress:
                    progress(done, total)
            if journal:  # it may speak of this file while the next is written
                out.flush()
                os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return combine_digests(digests)


def _whole(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, where: Path | str
) -> Tensor:
    """A tensor's bytes as they will lie in the file."""
    tensor = tensor.detach().cpu()
    tensor = cast_tensor(name, tensor, dtype, where) if dtype.is_floating_point else tensor.to(dtype)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{where}: {name} has shape {list(tensor.shape)}, its config says {list(shape)}"
        )
    return raw_bytes(tensor.contiguous())


def _nbytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _plan(specs: Specs, limit: int) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Cuts the tensors, in order, into shards of at most ``limit`` bytes (a larger tensor gets a shard of its own)."""
    if limit < 1:
        raise CheckpointError(f"max_shard_bytes={limit} must be positive")
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
    for name, (shape, dtype) in shard.items():
        stop = start + _nbytes((shape, dtype))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8, so that mapped tensors are aligned
    return len(text).to_bytes(8, "little") + text
