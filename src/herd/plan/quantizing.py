"""Predict the seconds of `herd quantize` from this machine's profile.

The tensors of the source are read one after another from a mapped file, hashed, rounded to blocks chunk by
chunk, and written. At the end the new file is hashed once more, on all threads. Nothing overlaps, so the
parts add up.
"""

from __future__ import annotations

import math

from ..llama.config import ModelConfig
from ..quant.formats import Scheme
from .profile import SHORT_NAMES, Profile


def quantize_seconds(profile: Profile, config: ModelConfig, plan: Scheme, source_bytes: float = 2.0) -> float:
    """Return the seconds of quantizing a folder in the page cache to a folder on disk.

    ``source_bytes`` is the number of bytes per parameter of the source.
    """
    formats = plan.plan(config)
    rounding = sum(
        math.prod(shape) / profile.encode[SHORT_NAMES[formats[name].name]]
        for name, shape in config.param_shapes()
        if formats[name].packed
    )
    out = plan.nbytes(config)
    hashing = config.nbytes(source_bytes) / profile.hash + out / profile.hash_all
    return rounding + hashing + (out / profile.disk_write if profile.disk_write else 0.0)
