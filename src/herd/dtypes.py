"""The number formats of tensors: one table of names, sizes and spellings in other programs.

Recipes, the command line and printed tables use the short names. A user may also give the long names of torch
and Hugging Face, or the codes of safetensors. Importing this module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """A number format: short name, torch's name, code in a safetensors header, and bytes per value."""

    name: str
    torch_name: str
    safetensors: str
    nbytes: int


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("fp64", "float64", "F64", 8),
        DType("fp32", "float32", "F32", 4),
        DType("bf16", "bfloat16", "BF16", 2),
        DType("fp16", "float16", "F16", 2),
        DType("fp8", "float8_e4m3fn", "F8_E4M3", 1),
        DType("int64", "int64", "I64", 8),
        DType("int32", "int32", "I32", 4),
        DType("int16", "int16", "I16", 2),
        DType("int8", "int8", "I8", 1),
        DType("uint8", "uint8", "U8", 1),
        DType("bool", "bool", "BOOL", 1),
    )
}
_BY_ANY_NAME = {
    spelling.lower(): dtype.name
    for dtype in DTYPES.values()
    for spelling in (dtype.name, dtype.torch_name, f"torch.{dtype.torch_name}", dtype.safetensors)
} | {"half": "fp16", "float": "fp32", "double": "fp64"}


def parse_dtype(text: str, allowed: tuple[str, ...] = tuple(DTYPES)) -> str:
    """Return the short name of a number format in any known spelling.

    Raises `ConfigError`, which lists ``allowed``, for any other text.
    """
    name = _BY_ANY_NAME.get(text.lower())
    if name is None or name not in allowed:
        raise ConfigError(f"dtype {text!r} is not one of {', '.join(allowed)}")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a name in any spelling."""
    import torch

    return getattr(torch, DTYPES[parse_dtype(name)].torch_name)


def short_name(dtype: torch.dtype) -> str:
    """Return the short name of torch's ``dtype``, e.g. "bf16"."""
    return parse_dtype(str(dtype))


def fast_dtype() -> str:
    """Return the dtype to compute in on this machine: bf16, or fp32 on a CPU without bf16 products."""
    import torch

    fast = (torch.cuda.is_available, torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return "bf16" if any(is_fast() for is_fast in fast) else "fp32"


def default_device() -> str:
    """Return the device to run a model on: a GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def nbytes_per_value(name: str) -> int:
    """Return the bytes of one value in the number format ``name``."""
    return DTYPES[parse_dtype(name)].nbytes
