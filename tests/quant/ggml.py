"""Encode and decode blocks with llama.cpp's own library (`make rivals`), by ctypes."""

import ctypes
import functools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

RIVALS = Path(os.environ.get("HERD_RIVALS", Path(__file__).parents[2] / ".venv-rivals"))


@functools.cache
def _library() -> ctypes.CDLL | None:
    files = sorted(RIVALS.glob("lib/python3*/site-packages/llama_cpp/lib/libggml-base.so"))
    return ctypes.CDLL(str(files[0])) if files else None


def require_ggml() -> ctypes.CDLL:
    """Return the library, or skip the test."""
    library = _library()
    if library is None:
        pytest.skip("needs llama.cpp: make rivals, or HERD_RIVALS=its environment")
    return library


def encode(x_RD: Tensor, format, importance_D: Tensor | None = None) -> Tensor:
    """Return the blocks (R, B) uint8 that llama.cpp makes of fp32 weights."""
    library = require_ggml()
    R, D = x_RD.shape
    x_RD = x_RD.float().contiguous()
    out_RB = torch.empty(R, D // format.block * format.block_bytes, dtype=torch.uint8)
    importance = None if importance_D is None else importance_D.float().contiguous()
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = library.ggml_quantize_chunk(
        ctypes.c_int(format.code),
        ctypes.c_void_p(x_RD.data_ptr()),
        ctypes.c_void_p(out_RB.data_ptr()),
        ctypes.c_int64(0),
        ctypes.c_int64(R),
        ctypes.c_int64(D),
        ctypes.c_void_p(None if importance is None else importance.data_ptr()),
    )
    assert written == out_RB.numel()
    return out_RB


def decode(blocks_RB: Tensor, format) -> Tensor:
    """Return the weights (R, D) that llama.cpp reads from blocks."""
    name = format.name.lower().replace("_k", "_K")
    rows_RB = blocks_RB.contiguous()
    out_RD = torch.empty(len(rows_RB), rows_RB.shape[1] // format.block_bytes * format.block)
    getattr(require_ggml(), f"dequantize_row_{name}")(
        ctypes.c_void_p(rows_RB.data_ptr()),
        ctypes.c_void_p(out_RD.data_ptr()),
        ctypes.c_int64(out_RD.numel()),
    )
    return out_RD
