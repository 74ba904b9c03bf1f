"""`herd sizes`: the published models as one table, exact to the parameter."""

from __future__ import annotations

from typing import Any

from ..llama.config import SIZES
from .common import Json, print_json, print_table


def rows() -> list[dict[str, Any]]:
    """One record a model: shape, exact parameters, bytes in bf16, bytes a token adds to a bf16 KV cache."""
    return [
        {
            "model": name,
            "n_params": config.n_params,
            "dim": config.dim,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "n_kv_heads": config.n_kv_heads,
            "ffn_dim": config.ffn_dim,
            "vocab_size": config.vocab_size,
            "max_context": config.max_context,
            "tied": config.tie_embeddings,
            "bf16_bytes": config.nbytes(2.0),
            "kv_bytes_per_token": config.kv_nbytes_per_token(2.0),
        }
        for name, config in SIZES.items()
    ]


def sizes_command(as_json: Json = False) -> None:
    """The published models: Llama 3.1 8B, 70B, 405B and Llama 3.2 1B, 3B, with exact parameter counts."""
    table = rows()
    if as_json:
        print_json(table)
        return
    print_table(
        ["model", "parameters", "layers", "dim", "heads:kv", "ffn", "bf16 GB", "KV KiB/token"],
        [
            [
                row["model"],
                f"{row['n_params']:,}",
                *(f"{row[key]:,}" for key in ("n_layers", "dim")),
                f"{row['n_heads']}:{row['n_kv_heads']}",
                f"{row['ffn_dim']:,}",
                f"{row['bf16_bytes'] / 1e9:,.1f}",
                f"{row['kv_bytes_per_token'] / 1024:,.0f}",
            ]
            for row in table
        ],
    )
    print(
        "Weights in GB (10^9 bytes), KV cache in KiB (1,024 bytes), both bf16. 3B and 1B tie their embeddings."
    )
