"""Bytes of a checkpoint in every format that weights are stored in. Meta's own shards of 405B: `files`.

The numbers are those of `herd.quant.formats` and `ModelConfig`; names and metadata of a file come on top, some
hundredths of a percent.
"""

from __future__ import annotations

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..quant.formats import BF16, FORMATS, TYPES, Format, Scheme, scheme


def checkpoint_nbytes(config: ModelConfig, format: str | Format) -> int:
    """Bytes of all weights in a GGUF format: norms in F32, the head of a 4-bit model in 8 bits, as `herd quantize` does
    it; in bf16 everything in 2 bytes."""
    found = TYPES[format] if isinstance(format, str) else format
    if found is BF16:
        return config.nbytes(2.0)
    return (scheme(found) if found.name in FORMATS else Scheme(found, found, found)).nbytes(config)


def block_formats(config: ModelConfig) -> dict[str, int]:
    """Bytes by GGUF format for every weight format that this model's rows divide into."""
    found = {}
    for name in TYPES:
        if name[0] in "IF" and name not in ("F32", "F16") and not name.startswith("IQ"):
            continue  # I8 and its kin, F64: types of data, not formats of weights
        if name.endswith("8_1") or name == "Q8_K":
            continue  # of activations only
        try:
            found[name] = checkpoint_nbytes(config, name)
        except QuantError:
            continue
    return found
