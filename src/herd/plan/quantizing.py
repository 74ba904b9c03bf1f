"""What `herd quantize` takes: seconds and bytes, from this machine's profile.

The source's tensors are read one after another from a mapped file, hashed, rounded to blocks in pieces and
written; at the end the new file is hashed once more, in pieces on all threads. Nothing overlaps, so the parts
add up. In memory lies one tensor of the source at a time, and a piece on its way.
"""

from __future__ import annotations

import math

from ..llama.config import ModelConfig
from ..quant.formats import Scheme
from .profile import Profile

SHORT = {"Q8_0": "q8", "Q4_0": "q4", "Q4_K": "q4k"}
PIECE_ROWS = 1024
"""Rows that are encoded at a time, in fp32 (`checkpoint.gguf_folder.PIECE_ROWS`)."""


def quantize_seconds(profile: Profile, config: ModelConfig, plan: Scheme, source_bytes: float = 2.0) -> float:
    """Seconds from a folder of plain weights, already in the page cache, to a quantized one on the disk."""
    formats = plan.plan(config)
    rounding = sum(
        math.prod(shape) / profile.encode[SHORT[formats[name].name]]
        for name, shape in config.param_shapes()
        if formats[name].packed
    )
    out = plan.nbytes(config)
    hashing = config.nbytes(source_bytes) / profile.hash + out / profile.hash_all
    return rounding + hashing + (out / profile.disk_write if profile.disk_write else 0.0)


def quantize_nbytes(config: ModelConfig, plan: Scheme, source_bytes: float = 2.0) -> float:
    """Bytes beside the process itself: the largest tensor as it is mapped, and a piece in its new form."""
    shapes = [shape for _, shape in config.param_shapes()]
    largest = max(math.prod(shape) for shape in shapes)
    piece = min(PIECE_ROWS, max(shape[0] for shape in shapes)) * max(shape[-1] for shape in shapes)
    return largest * source_bytes + piece * plan.linears.bits / 8
