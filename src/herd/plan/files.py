"""How large a model's published files are, to the byte of its weights, and Meta's own files to check that by.

Meta published 405B three times: in bf16 for 8 ranks, in FP8 for 8, and in bf16 for 16. The last is larger than the
model: 16 ranks cannot divide 8 KV heads, so every rank carries a copy of one, and the file stores each KV head twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..llama.config import SIZES, ModelConfig

SOURCE = "meta-llama/llama-models models/sku_list.py (bytes of the .pth shards)"


@dataclass(frozen=True)
class Shards:
    """Files of one published checkpoint."""

    count: int
    nbytes_each: int

    @property
    def nbytes(self) -> int:
        return self.count * self.nbytes_each


PUBLISHED_405B: dict[str, Shards] = {
    "BF16": Shards(8, 101_470_976_045),
    "FP8": Shards(8, 60_903_742_309),
    "MP16": Shards(16, 51_268_302_389),
}


def mp_params(config: ModelConfig, ranks: int) -> int:
    """Parameters in the files of ``ranks`` model-parallel ranks: KV heads are repeated until each rank has one."""
    return config.replace(n_kv_heads=max(config.n_kv_heads, ranks)).n_params


def fp8_nbytes(config: ModelConfig) -> int:
    """Bytes of Meta's FP8 checkpoint: the FFN's three matrices in one byte, except in the first and the last layer,
    with an fp32 scale a row; all else in bf16. Source: the paper's section 6.2 and the size of the published files."""
    layers = config.n_layers - 2
    eight_bit = layers * 3 * config.dim * config.ffn_dim
    scales = layers * (2 * config.ffn_dim + config.dim)
    return 2 * config.n_params - eight_bit + 4 * scales


def computed_405b() -> dict[str, int]:
    """What the formulas say of the three published files."""
    config = SIZES["405B"]
    return {"BF16": config.nbytes(2.0), "FP8": fp8_nbytes(config), "MP16": 2 * mp_params(config, 16)}
