"""Exact sizes of the published models: parameters, checkpoint bytes in every format, KV cache bytes a token.

Meta's 405B was published in three sharded forms; what each holds, in parameters and bytes:

- BF16 in 8 shards: every parameter in 2 bytes.
- FP8 in 8 shards: the matrices of the FFN in 1 byte, in all layers but the first and the last; everything else bf16.
- MP16 in 16 shards: 8 KV heads do not divide by 16, so each is stored twice; bf16.

Scales, tensor names and the pickle's own bytes are left out: they are the difference of some hundredths of a percent.
"""

from __future__ import annotations

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..quant.formats import BF16, FORMATS, TYPES, Format, Scheme, scheme


def checkpoint_nbytes(config: ModelConfig, format: str | Format) -> int:
    """Bytes of all weights in a GGUF format, norms in F32; in bf16 everything in 2 bytes."""
    found = TYPES[format] if isinstance(format, str) else format
    if found is BF16:
        return config.nbytes(2.0)
    return (scheme(found) if found.name in FORMATS else Scheme(found, found, found)).nbytes(config)


def fp8_nbytes(config: ModelConfig) -> int:
    """Bytes of Meta's FP8 form: FFN matrices of the inner layers in 1 byte, the rest in 2."""
    inner = config.n_layers - 2
    return config.nbytes(2.0) - inner * 3 * config.dim * config.ffn_dim


def mp_nbytes(config: ModelConfig, shards: int) -> int:
    """Bytes of a bf16 checkpoint cut into ``shards`` for tensor parallelism: KV heads repeated beyond their number."""
    return config.replace(n_kv_heads=max(config.n_kv_heads, shards)).nbytes(2.0)


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
