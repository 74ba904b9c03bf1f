"""Weights in safetensors files: look before loading, hash what matters.

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), raw bytes. What can
be wrong with a file shows in its header and size, so all headers are read and compared with the configuration before
one byte is allocated for weights. A pickle is never opened: it can run code.

The hash of a checkpoint is taken over tensors sorted by name (name, dtype, shape, bytes), so it does not depend on how
they were cut into files.

Source: https://github.com/huggingface/safetensors (format; no holes, no overlaps, header at most 100 MB).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..llama.config import ModelConfig
from .hf import read_json

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE = 1 << 22
"""Values looked at at a time."""
_MAX_HEADER = 100_000_000
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_ITEM_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, safetensors dtype name and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, from its header, checked against the file's size. Raises `CheckpointError`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: truncated or not safetensors: header of {length} bytes in {size} bytes"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}; fetch the file again") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: _entry(value) for name, value in header.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header: {error}; fetch the file again") from error
    end = 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end or stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise CheckpointError(
                f"{path}: {name}: byte range [{start}, {stop}) does not fit; fetch the file again"
            )
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: truncated: {8 + length + end} bytes promised, {size} found; fetch the file again"
        )
    return {name: TensorInfo(path, dtype, shape) for name, (dtype, shape, _, _) in entries.items()}


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, from the headers alone. Raises `CheckpointError`."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder}: has both {SINGLE} and {INDEX}; delete the stale one")
    if single.exists():
        return read_header(single)
    if not index.exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickled weights ({pickles[0]}), which can run code and are refused; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; is it a checkpoint folder?")
    return _read_sharded(folder, index)


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    data = read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; fetch the file again")
    out: dict[str, TensorInfo] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        if not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index}: {file!r} is not a plain *.safetensors file name in this folder; refused"
            )
        if not (folder / file).exists():
            raise CheckpointError(f"{folder}: shard {file} is missing; fetch it again")
        for name, info in read_header(folder / file).items():
            if name in out:
                raise CheckpointError(
                    f"{folder}: {name} is in both {out[name].file.name} and {file}; fetch them again"
                )
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{folder}: {name} is in {file}, {INDEX} says {weight_map.get(name)}; fetch them again"
                )
            out[name] = info
    for name, file in weight_map.items():
        if name not in out:
            raise CheckpointError(
                f"{folder}: {INDEX} promises {name} in {file}, which lacks it; fetch them again"
            )
    return out


def check_against(config: ModelConfig, index: Mapping[str, TensorInfo], where: Path) -> dict[str, TensorInfo]:
    """The tensors the model needs, in file order, or `CheckpointError` for one missing, extra or of the wrong shape.

    Two extras are known and dropped: the rotary table old transformers saved, and the copy of a tied head.
    """
    wanted: dict[str, TensorInfo] = {}
    for name, shape in config.param_shapes():
        if name not in index:
            raise CheckpointError(
                f"{where}: tensor {name} is missing; config.json and weights do not belong together"
            )
        info = index[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(info.shape)}, config.json says {list(shape)}"
            )
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{where}: {name} has dtype {info.dtype}; only {', '.join(DTYPES)} can be run"
            )
        wanted[name] = info
    for name in index:
        if name in wanted or name.endswith(".rotary_emb.inv_freq"):
            continue
        if config.tie_embeddings and name == "lm_head.weight":
            _check_tied_copy(index, where)
            continue
        raise CheckpointError(
            f"{where}: unexpected tensor {name}; config.json and weights do not belong together"
        )
    return wanted


def _check_tied_copy(index: Mapping[str, TensorInfo], where: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    infos = [index[name] for name in names]
    same = infos[0].shape == infos[1].shape and infos[0].dtype == infos[1].dtype
    if same:
        first, second = (raw_bytes(read_tensor(name, index[name])) for name in names)
        same = torch.equal(first, second)
    if not same:
        raise CheckpointError(
            f"{where}: lm_head.weight differs from the embedding, yet tie_word_embeddings is true"
        )


def read_tensor(name: str, info: TensorInfo) -> Tensor:
    """The tensor as stored, on the CPU, lying in the mapped file: clone it to change it.

    The file is opened for it alone, so that its pages are let go with it: a model of any size passes through.
    """
    try:
        with safe_open(info.file, framework="pt", device="cpu") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error


def common_dtype(index: Mapping[str, TensorInfo], where: Path) -> torch.dtype:
    """The dtype the weights are stored in; where they differ, the widest, with a warning."""
    found = {DTYPES[info.dtype] for info in index.values()}
    if len(found) == 1:
        return found.pop()
    widest = torch.float32
    warnings.warn(f"{where}: weights are stored in several dtypes; using {widest} for all", stacklevel=3)
    return widest


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype, where: Path | str) -> Tensor:
    """``tensor`` in ``dtype``; `CheckpointError` where a finite value would become infinite."""
    if tensor.dtype == dtype:
        return tensor
    out = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    for target, part in zip(_pieces(out), _pieces(tensor), strict=True):
        target.copy_(part)
        if narrower and bool((torch.isinf(target) & ~torch.isinf(part)).any()):
            raise CheckpointError(
                f"{where}: {name} has values beyond the range of {dtype}; use bfloat16 or float32"
            )
    return out


def require_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    """`CheckpointError` when a weight is NaN or infinite."""
    if not all(bool(torch.isfinite(part).all()) for part in _pieces(tensor)):
        raise CheckpointError(f"{where}: {name} has values that are not finite; the checkpoint is damaged")


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """All values in parts, so that what is made of them on the way is small; of a contiguous tensor they are views."""
    return tensor.reshape(-1).split(PIECE)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a tensor name appears twice")
    return out


def _entry(value: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(value, dict):
        raise ValueError(f"entry {value!r} is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"shape {shape!r} or data_offsets {offsets!r} is malformed")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def hash_weights(wanted: Mapping[str, TensorInfo], progress: Progress | None = None) -> str:
    """sha256 over the tensors as stored, independent of sharding; reads every byte once."""
    total, done = sum(info.nbytes for info in wanted.values()), 0
    digests: dict[str, str] = {}
    for name, info in wanted.items():
        digests[name] = tensor_digest(name, info.dtype, info.shape, raw_bytes(read_tensor(name, info)))
        done += info.nbytes
        if progress:
            progress(done, total)
    return combine_digests(digests)


class Hashing:
    """The hash of weights as they are read for another purpose, taken beside it on other threads."""

    def __init__(self, wanted: Mapping[str, TensorInfo]) -> None:
        self._wanted = wanted
        self._pool = ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1)))
        self._digests: dict[str, Future[str]] = {}

    def add(self, name: str, stored: Tensor) -> None:
        """One tensor as stored; it must not change until `result`."""
        info = self._wanted[name]
        self._digests[name] = self._pool.submit(
            tensor_digest, name, info.dtype, info.shape, raw_bytes(stored)
        )

    def result(self) -> str:
        """The hash, once all have been added."""
        out = combine_digests({name: future.result() for name, future in self._digests.items()})
        self._pool.shutdown()
        return out


def tensor_digest(name: str, dtype: str, shape: tuple[int, ...], data: Tensor) -> str:
    """sha256 of one tensor; ``data`` are its `raw_bytes`."""
    sha = hashlib.sha256(f"{name}\0{dtype}\0{list(shape)}\0".encode())
    sha.update(data.numpy())  # type: ignore[arg-type]
    return sha.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """The checkpoint's hash from its tensors' digests."""
    return hashlib.sha256(
        "".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()
    ).hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def weight_files(wanted: Mapping[str, TensorInfo]) -> list[Path]:
    """The files that hold these tensors, each once."""
    return sorted({info.file for info in wanted.values()})


def iterate(wanted: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor as stored) of every tensor, one at a time."""
    for name, info in wanted.items():
        yield name, read_tensor(name, info)
