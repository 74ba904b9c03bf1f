"""Quantized weights: GGUF's block formats, layers that run from the blocks, and GPTQ.

`formats.py` knows sizes (without torch); `blocks.py`, `grids.py` and `packing.py` turn weights into bytes and back;
`linear.py` holds packed layers, `matmul.py` is where kernels slot in; `gptq.py` finds better codes for the same blocks.
"""

from .formats import FORMATS, TYPES, Format, Scheme, find_format, scheme, tensor_nbytes

__all__ = ["FORMATS", "TYPES", "Format", "Scheme", "find_format", "scheme", "tensor_nbytes"]
