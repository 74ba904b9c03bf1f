"""How many bytes the KV cache takes: the one formula, without torch, used by the cache, by receipts and by planning."""

from __future__ import annotations

from ..errors import EngineError
from ..kernels.page_layout import BYTES, PAGE
from ..llama.config import ModelConfig

PREFILL_TOKENS = 2048
"""Most prompt tokens of one step: enough to fill the matmuls, few enough to keep the activations small."""


def nbytes(config: ModelConfig, slots: int, context: int, bytes_per_value: float = BYTES["bf16"]) -> int:
    """Bytes of a cache of ``slots`` sequences of ``context`` tokens (rounded up to pages), of one of the `BYTES`."""
    return slots * n_pages(context) * page_nbytes(config, bytes_per_value)


def page_nbytes(config: ModelConfig, bytes_per_value: float) -> int:
    """Bytes of one page: `PAGE` tokens of all layers."""
    return PAGE * config.kv_nbytes_per_token(bytes_per_value)


def n_pages(tokens: int) -> int:
    """Pages that ``tokens`` tokens of one sequence need."""
    return -(-tokens // PAGE)


def require_kind(kv: str) -> None:
    """EngineError for a kind of cache that does not exist; "auto" leaves it to the model."""
    if kv not in ("auto", *BYTES):
        raise EngineError(f"kv={kv!r}: the cache can be {', '.join(BYTES)} or auto")
