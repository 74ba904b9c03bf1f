"""Quantized weights: GGUF's block formats, layers that compute with the blocks, and GPTQ.

`formats.py` has names and sizes (without torch); `blocks.py`, `grids.py` and `packing.py` convert weights to
bytes and back; `linear.py` has the packed layers and `matmul.py` chooses their kernels; `gptq.py` finds
better codes for the same blocks; `random.py` makes random weights for measuring speed.
"""

from .formats import FORMATS, NATIVE, TYPES, Format, Scheme, find_format, scheme, tensor_nbytes

__all__ = ["FORMATS", "NATIVE", "TYPES", "Format", "Scheme", "find_format", "scheme", "tensor_nbytes"]
