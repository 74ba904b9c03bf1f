"""Read weights from safetensors files. All headers are checked first.

The safetensors package checks a file's header and size when it opens the file (no holes, no overlaps, nothing
missing). The headers of all files are read and compared with the configuration before memory is allocated for
weights. Pickles are never opened, because they can run code.

The hash of a checkpoint covers its tensors sorted by name (name, dtype, shape, bytes), so it does not depend
on how they are split into files.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..dtypes import DTYPES, torch_dtype
from ..errors import CheckpointError
from ..llama.config import ModelConfig
from ..machine import cores
from .foreign import refuse_quantized_names
from .hf import read_object
from .names import PARTIAL_BIASES
from .paths import INDEX, LFS_POINTER, SINGLE

STORABLE = {DTYPES[name].safetensors: torch_dtype(name) for name in ("fp32", "fp16", "bf16")}
"""Dtypes of weights by their codes in a safetensors header."""
FP8 = "F8_E4M3"
PIECE = 1 << 22
"""Number of values that are converted or checked at a time."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WRAPPED = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(?:module\.|{_WRAPPED})+|(?<=\.){_WRAPPED}")
"""What DDP, torch.compile, FSDP and activation checkpointing add to the names of tensors."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class TensorInfo:
    """The location of a stored tensor: its file and name there, safetensors' dtype code, and shape.

    With a ``scale`` the file has FP8, and `read_tensor` converts it to ``dtype``.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORABLE[self.dtype].itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file. Raises `CheckpointError` if it is damaged or not safetensors."""
    try:
        with path.open("rb") as start:
            if start.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path}: is a git-lfs pointer, not the weights; run: git lfs pull")
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: TensorInfo(path, name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: truncated or corrupt ({reason}); fetch it again") from error


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors of a checkpoint folder, from the headers only. Raises `CheckpointError`."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder}: has both {SINGLE} and {INDEX}; delete the stale one")
    if single.exists():
        return _without_prefix(read_header(single), folder)
    if not index.exists():
        raise CheckpointError(_why_no_weights(folder))
    return _without_prefix(_read_sharded(folder, index), folder)


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: only pickled weights ({pickles[0]}), which can run code and are refused; "
            "convert them to safetensors first"
        )
    return f"{folder}: no {SINGLE} and no {INDEX}; is it a checkpoint folder?"


def _without_prefix(index: dict[str, TensorInfo], folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors by their own names, without what wrappers of training have added to them."""
    added = {found[0] for name in index for found in WRAPPERS.finditer(name)}
    if not added:
        return index
    parts = " and ".join(sorted(added))
    warnings.warn(f"{folder}: removing the prefix {parts} from the names of tensors", stacklevel=4)
    stripped = {name: WRAPPERS.sub("", name) for name in index}
    twice = [name for name, n in Counter(stripped.values()).items() if n > 1]
    if twice:
        raise CheckpointError(f"{folder}: has {twice[0]} with and without {parts}; delete one")
    return {stripped[name]: info for name, info in index.items()}


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; fetch the file again")
    out: dict[str, TensorInfo] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        if not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: {file!r} is refused: it is not a plain *.safetensors name")
        if not (folder / file).exists():
            raise CheckpointError(f"{folder}: shard {file} is missing; fetch it again")
        for name, info in read_header(folder / file).items():
            if name in out:
                raise CheckpointError(f"{folder}: {name} is both in {out[name].file.name} and {file}")
            if weight_map.get(name) != file:
                raise CheckpointError(f"{folder}: {name} is in {file}, {INDEX} says {weight_map.get(name)}")
            out[name] = info
    for name, file in weight_map.items():
        if name not in out:
            raise CheckpointError(f"{folder}: {INDEX} promises {name} in {file}, which lacks it")
    return out


def check_against(config: ModelConfig, index: Mapping[str, TensorInfo], where: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the model needs, in file order.

    Raises `CheckpointError` if a tensor is missing, unexpected or of the wrong shape. Two extra tensors are
    ignored: the rotary table of old transformers, and the copy of a tied head. If a tied model stores only
    its head, the embedding is read from there. Meta's FP8 weights are joined with their scales.
    """
    index = _with_scales(index, where)
    refuse_quantized_names(index, where)
    if config.tie_embeddings and _EMBEDDING not in index and _HEAD in index:
        index = {_EMBEDDING if name == _HEAD else name: info for name, info in index.items()}
    wanted: dict[str, TensorInfo] = {}
    for name, shape in config.param_shapes():
        if name not in index:
            raise CheckpointError(f"{where}: {name} is missing; {_misfit(name)}")
        info = index[name]
        if info.shape != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(info.shape)}, not {list(shape)}")
        if info.dtype not in STORABLE:
            raise CheckpointError(f"{where}: {name} is {info.dtype}; only {', '.join(STORABLE)} can be run")
        wanted[name] = info
    for name in index:
        if name in wanted or name.endswith(".rotary_emb.inv_freq"):
            continue
        if config.tie_embeddings and name == _HEAD:
            _check_tied_copy(index, where)
            continue
        raise CheckpointError(f"{where}: unexpected tensor {name}; {_misfit(name)}")
    return wanted


def _misfit(name: str) -> str:
    """Return what is wrong with a checkpoint that has one tensor too few or too many."""
    if name == _HEAD:
        return "if the model's head is its embedding, set tie_word_embeddings in config.json to true"
    if not name.endswith(".bias"):
        return "config.json and weights do not fit"
    flag = "mlp_bias" if ".mlp." in name else "attention_bias"
    return f"{flag} in config.json and the weights do not fit; {PARTIAL_BIASES}"


def _with_scales(index: Mapping[str, TensorInfo], where: Path) -> Mapping[str, TensorInfo]:
    """Return the tensors with FP8 weights described as bf16 with a scale for each row (Meta's FP8 layout)."""
    if not any(info.dtype == FP8 for info in index.values()):
        return index
    out = dict(index)
    for name, info in index.items():
        scale = index.get(f"{name}_scale")
        if info.dtype != FP8 or scale is None:
            continue
        if scale.dtype not in STORABLE or len(info.shape) != 2 or math.prod(scale.shape) != info.shape[0]:
            raise CheckpointError(
                f"{where}: {name}_scale is {scale.dtype} {list(scale.shape)}, not a number for each of "
                f"{info.shape[0]} rows; only Meta's FP8 layout (fbgemm_fp8) is read"
            )
        out[name] = replace(info, dtype="BF16", scale=scale)
        for extra in (f"{name}_scale", name.replace(".weight", ".input_scale_ub")):
            out.pop(extra, None)
    return out


def _check_tied_copy(index: Mapping[str, TensorInfo], where: Path) -> None:
    infos = [index[name] for name in (_EMBEDDING, _HEAD)]
    same = infos[0].shape == infos[1].shape and infos[0].dtype == infos[1].dtype
    if not same or not torch.equal(*(raw_bytes(read_tensor(info)) for info in infos)):
        raise CheckpointError(
            f"{where}: tie_word_embeddings is true, but lm_head.weight is not the embedding; "
            "set it to false in config.json to use both"
        )


def read_tensor(info: TensorInfo) -> Tensor:
    """Return the tensor as stored, on the CPU and mapped from its file. Clone it before changing it.

    FP8 weights are multiplied by their scales and become bf16. The file is opened for this tensor only, so
    its memory pages are released with it, and a model of any size can be streamed.
    """
    try:
        with safe_open(info.file, framework="pt", device="cpu") as file:
            tensor = file.get_tensor(info.name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{info.file}: {info.name} cannot be read: {error}") from error
    return tensor if info.scale is None else _scaled(tensor, read_tensor(info.scale))


def _scaled(codes_RD: Tensor, scales: Tensor) -> Tensor:
    """Return an FP8 matrix times the scales of its rows, in bf16. Some rows are converted at a time."""
    out_RD = torch.empty(codes_RD.shape, dtype=torch.bfloat16)
    rows = max(1, PIECE // codes_RD.shape[1])
    for start in range(0, len(codes_RD), rows):
        part = slice(start, start + rows)
        out_RD[part] = codes_RD[part].float() * scales.reshape(-1, 1)[part].float()
    return out_RD


def common_dtype(index: Mapping[str, TensorInfo], where: Path) -> torch.dtype:
    """Return the dtype of the matrices. Returns fp32, with a warning, if they have several dtypes.

    Norms do not count, because they are small, and some tools store them in fp32 within a bf16 checkpoint.
    """
    found = {STORABLE[info.dtype] for info in index.values() if len(info.shape) > 1}
    if len(found) == 1:
        return found.pop()
    warnings.warn(f"{where}: matrices are stored in several dtypes; using fp32 for all", stacklevel=3)
    return torch.float32


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype, where: Path | str) -> Tensor:
    """Return ``tensor`` in ``dtype``. Raises `CheckpointError` if a finite value would become infinite."""
    if tensor.dtype == dtype:
        return tensor
    out = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    for target, part in zip(_pieces(out), _pieces(tensor), strict=True):
        target.copy_(part)
        if narrower and bool((torch.isinf(target) & ~torch.isinf(part)).any()):
            raise CheckpointError(f"{where}: {name} has values beyond the range of {dtype}; use bf16 or fp32")
    return out


def require_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    """Raise `CheckpointError` if a weight is NaN or infinite."""
    if not all(bool(torch.isfinite(part).all()) for part in _pieces(tensor)):
        raise CheckpointError(f"{where}: {name} has values that are not finite; the checkpoint is damaged")


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return all values in chunks, so that temporaries are small. Chunks of a contiguous tensor are views."""
    return tensor.reshape(-1).split(PIECE)


def hash_weights(wanted: Mapping[str, TensorInfo]) -> str:
    """Return the SHA-256 over the tensors as stored, independent of sharding. Reads every byte once."""
    return combine_digests(
        {
            name: tensor_digest(name, info.dtype, info.shape, raw_bytes(read_tensor(info)))
            for name, info in wanted.items()
        }
    )


class BackgroundHash:
    """A hash of weights that is computed on other threads while they are read for another purpose."""

    def __init__(self, wanted: Mapping[str, TensorInfo]) -> None:
        self._wanted = wanted
        self._pool = ThreadPoolExecutor(min(4, cores()))
        self._digests: dict[str, Future[str]] = {}

    def add(self, name: str, stored: Tensor) -> None:
        """Hash one tensor as stored. It must not change until `result`."""
        info = self._wanted[name]
        data = raw_bytes(stored)
        self._digests[name] = self._pool.submit(tensor_digest, name, info.dtype, info.shape, data)

    def result(self) -> str:
        """Return the hash, once all tensors have been added."""
        out = combine_digests({name: future.result() for name, future in self._digests.items()})
        self._pool.shutdown()
        return out


def tensor_digest(name: str, dtype: str, shape: tuple[int, ...], data: Tensor) -> str:
    """Return the SHA-256 of one tensor. ``data`` has its `raw_bytes`."""
    sha = hashlib.sha256(f"{name}\0{dtype}\0{list(shape)}\0".encode())
    sha.update(data.numpy())  # type: ignore[arg-type]
    return sha.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return the checkpoint's hash from its tensors' digests."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return the tensor's memory as a flat uint8 tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
