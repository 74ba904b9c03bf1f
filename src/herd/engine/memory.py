"""How many bytes the KV cache takes: the one formula, without torch, used by the cache, by receipts and by planning."""

from __future__ import annotations

from ..llama.config import ModelConfig

BLOCK = 64
"""The cache grows by blocks of this many tokens: often enough to waste little, seldom enough that copying is cheap."""


def nbytes(config: ModelConfig, slots: int, context: int, bytes_per_value: float = 2.0) -> int:
    """Bytes of a cache of ``slots`` sequences of ``context`` tokens (rounded up to blocks); 2.0 = bf16, 4.0 = fp32."""
    return slots * round_to_block(context) * config.kv_nbytes_per_token(bytes_per_value)


def round_to_block(tokens: int) -> int:
    """The next multiple of `BLOCK`."""
    return -(-tokens // BLOCK) * BLOCK
