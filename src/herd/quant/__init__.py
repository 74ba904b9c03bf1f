"""Quantized weights: GGUF's block formats, layers that compute with the blocks, and GPTQ.

`formats.py` has names and sizes (without torch). `legacy.py`, `k_quants.py` and `iq4.py` have one class per
format, and `blocks.py` converts weights to bytes and back with them. `linear.py` has the packed layers and
`matmul.py` chooses their kernels. `gptq.py` finds better codes for the same blocks. `random.py` makes random
weights for measuring speed.
"""

from .formats import FORMATS, TYPES, Format, Scheme, find_format, scheme, tensor_nbytes

__all__ = ["FORMATS", "TYPES", "Format", "Scheme", "find_format", "scheme", "tensor_nbytes"]
