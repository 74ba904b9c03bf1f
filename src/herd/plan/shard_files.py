"""Exact sizes of a model's published files, and the sizes of Meta's files of 405B for comparison.

Meta published 405B three times: in bf16 for 8 ranks, in FP8 for 8 ranks, and in bf16 for 16 ranks. The last
is larger than the model: 16 ranks cannot divide 8 KV heads, so each rank has a copy of one head, and the
files store each KV head twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..llama.config import SIZES, ModelConfig


@dataclass(frozen=True)
class ShardFiles:
    """The weight files of a published checkpoint: their number and the bytes of each."""

    count: int
    nbytes_each: int

    @property
    def nbytes(self) -> int:
        return self.count * self.nbytes_each


PUBLISHED_405B: dict[str, ShardFiles] = {
    "BF16": ShardFiles(8, 101_470_976_045),
    "FP8": ShardFiles(8, 60_903_742_309),
    "MP16": ShardFiles(16, 51_268_302_389),
}
"""Bytes of the .pth shards. Source: meta-llama/llama-models, models/sku_list.py."""


def fp8_nbytes(config: ModelConfig) -> int:
    """Return the bytes of Meta's FP8 checkpoint.

    The three matrices of each FFN take one byte per weight and an fp32 scale per row, except in the first and
    the last layer. Everything else is bf16. Source: section 6.2 of the paper, and the sizes of the published
    files.
    """
    layers = config.n_layers - 2
    eight_bit = layers * 3 * config.dim * config.ffn_dim
    scales = layers * (2 * config.ffn_dim + config.dim)
    return 2 * config.n_params - eight_bit + 4 * scales


def computed_405b() -> dict[str, int]:
    """Return the bytes that the formulas give for the three published checkpoints of 405B."""
    config = SIZES["405B"]
    return {
        "BF16": config.nbytes(2.0),
        "FP8": fp8_nbytes(config),
        "MP16": 2 * config.replace(n_kv_heads=16).n_params,  # KV heads are repeated until each rank has one
    }
