"""Other programs' names of parameters, and their order of the channels that RoPE rotates.

RoPE rotates pairs of channels. Meta and GGUF pair neighbours (2i, 2i + 1); Hugging Face and Herd pair the two
halves of a head (i, i + K/2). Attention scores are the same if q and k agree, so the rows of both matrices
are permuted in import and export. Blocks of quantized weights are parts of a row, so quantized rows are
permuted like others.

Shapes: D model dim (or the bytes of a packed row), K head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..package_yaml import package_yaml

if TYPE_CHECKING:
    from torch import Tensor

TABLES = package_yaml(__package__, "names.yaml")

PARTIAL_BIASES = "biases in only some layers or projections cannot be run"
"""The reason to refuse a checkpoint whose biases are neither in all layers nor in none."""


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter, e.g. ``blk.0.attn_q.weight``."""
    return _translate(name, 0, "blk")


def meta_name(name: str) -> str:
    """Return Meta's name of a parameter, e.g. ``layers.0.attention.wq.weight``."""
    return _translate(name, 1, "layers")


def _translate(name: str, column: int, layers: str) -> str:
    stem, _, part = name.rpartition(".")  # part is "weight" or "bias"
    if stem in TABLES["tensors"]:
        return f"{TABLES['tensors'][stem][column]}.{part}"
    _, _, layer, rest = stem.split(".", 3)
    return f"{layers}.{layer}.{TABLES['layer_tensors'][rest][column]}.{part}"


def rotates(name: str) -> bool:
    """Return whether a parameter's rows are channels that rotate (weights and biases of q and k)."""
    return ".q_proj." in name or ".k_proj." in name


def to_pairs(name: str, rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a parameter, (heads·K, …), in the order of Meta and GGUF."""
    if not rotates(name):
        return rows
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def from_pairs(name: str, rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a parameter, (heads·K, …), given in the order of Meta and GGUF, in Herd's order."""
    if not rotates(name):
        return rows
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
