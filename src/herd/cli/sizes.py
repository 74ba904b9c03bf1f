"""`herd sizes`: the published models as one table, exact to the parameter."""

from __future__ import annotations

from ..llama.config import SIZES
from .common import Json, print_json, print_table

FIELDS = ("n_params", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_context")


def sizes_command(as_json: Json = False) -> None:
    """List the published models, Llama 3.1 8B, 70B, 405B and Llama 3.2 1B, 3B, with exact parameter
    counts."""
    if as_json:
        print_json(
            [
                {
                    "model": name,
                    **{field: getattr(config, field) for field in FIELDS},
                    "tied": config.tie_embeddings,
                    "bf16_bytes": config.nbytes(2.0),
                    "kv_bytes_per_token": config.kv_nbytes_per_token(2.0),
                }
                for name, config in SIZES.items()
            ]
        )
        return
    print_table(
        ["model", "parameters", "layers", "dim", "heads:kv", "ffn", "bf16 GB", "KV KiB/token"],
        [
            [
                name,
                f"{config.n_params:,}",
                f"{config.n_layers:,}",
                f"{config.dim:,}",
                f"{config.n_heads}:{config.n_kv_heads}",
                f"{config.ffn_dim:,}",
                f"{config.nbytes(2.0) / 1e9:,.1f}",
                f"{config.kv_nbytes_per_token(2.0) / 1024:,.0f}",
            ]
            for name, config in SIZES.items()
        ],
    )
    print(
        "Weights in GB (10^9 bytes), KV cache in KiB (1,024 bytes), both bf16. 3B and 1B tie their "
        "embeddings."
    )
