"""Read and write llama.cpp's files of importance: the mean squares of the inputs of every matrix.

`llama-imatrix` writes a GGUF file with two tensors for each matrix: the sums of squares ``NAME.in_sum2`` and
the number of tokens ``NAME.counts``. Its older files (``.dat``) are read too.

Source: llama.cpp ``tools/imatrix/imatrix.cpp``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..llama.config import ModelConfig
from .gguf import GGUF
from .gguf_write import write_fp32_gguf
from .names import gguf_name

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_NAME = 1024


def read_importance(path: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the mean squares (D,) fp32 of the matrices' inputs, by Herd's names of parameters.

    Matrices that the file lacks are left out. Raises `CheckpointError` for a file that is invalid, of another
    shape, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a file of llama-imatrix or of --save-imatrix")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    found = _read_gguf(path) if is_gguf else _read_dat(path)
    out: dict[str, Tensor] = {}
    for name, shape in config.param_shapes():
        mean_D = found.get(gguf_name(name))
        if len(shape) < 2 or mean_D is None:
            continue
        if len(mean_D) != shape[-1]:
            raise CheckpointError(
                f"{path}: {gguf_name(name)} has {len(mean_D)} columns, the model's {shape[-1]}; "
                "it was measured on another model"
            )
        if not bool(mean_D.isfinite().all()) or bool((mean_D < 0).any()):
            raise CheckpointError(
                f"{path}: {gguf_name(name)} has values that are not mean squares; measure again"
            )
        out[name] = mean_D
    if not out:
        raise CheckpointError(f"{path}: has the importance of no matrix of this model")
    return out


def _read_gguf(path: Path) -> dict[str, Tensor]:
    file = GGUF(path)
    out: dict[str, Tensor] = {}
    for stored in file.tensors:
        name = stored.removesuffix(SUMS)
        if name == stored:
            continue
        if f"{name}{COUNTS}" not in file.tensors:
            raise CheckpointError(f"{path}: {name} has sums without counts; measure again")
        sums, counts = (file.rows(f"{name}{part}").view(torch.float32).flatten() for part in (SUMS, COUNTS))
        # several counts belong to the experts of another architecture
        if len(counts) == 1 and float(counts) > 0:
            out[name] = sums.clone() / counts
    return out


def _read_dat(path: Path) -> dict[str, Tensor]:
    data, position = path.read_bytes(), 0

    def take(size: int) -> bytes:
        nonlocal position
        if not 0 <= size <= len(data) - position:
            raise CheckpointError(f"{path}: is neither a GGUF file nor an older imatrix file, or truncated")
        position += size
        return data[position - size : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    out: dict[str, Tensor] = {}
    for _ in range(number()):
        if not 0 < (length := number()) <= MAX_NAME:
            raise CheckpointError(f"{path}: is neither a GGUF file nor an older file of importance")
        name = take(length).decode(errors="replace")
        n_calls = number()
        values = take(4 * number())
        out[name] = torch.frombuffer(bytearray(values), dtype=torch.float32) / max(1, n_calls)
    return out


def write_importance(
    path: str | Path, importance: Mapping[str, Tensor], n_tokens: int, context: int, text: str
) -> None:
    """Write importance as llama.cpp's tools read it. ``text`` names the source, of ``n_tokens`` tokens."""
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; make it first")
    tensors: dict[str, Tensor] = {}
    for name in sorted(importance, key=gguf_name):
        tensors[f"{gguf_name(name)}{SUMS}"] = (importance[name].float() * n_tokens).view(1, -1)
        tensors[f"{gguf_name(name)}{COUNTS}"] = torch.tensor([[float(n_tokens)]])
    metadata = [
        ("general.type", "STRING", "imatrix"),
        ("imatrix.datasets", "[STRING", [text]),
        ("imatrix.chunk_count", "UINT32", -(-n_tokens // context)),
        ("imatrix.chunk_size", "UINT32", context),
    ]
    write_fp32_gguf(path, metadata, tensors)
