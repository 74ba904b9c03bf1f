"""`herd sizes`: a table of the published models with exact parameter counts."""

from __future__ import annotations

from ..llama.config import SIZES
from .common import Json, picked, print_json
from .plan_options import print_rows

FIELDS = "n_params dim n_layers n_heads n_kv_heads ffn_dim vocab_size max_context tied=tie_embeddings"


def sizes_command(as_json: Json = False) -> None:
    """List the published models (Llama 3.1 8B, 70B, 405B; Llama 3.2 1B, 3B) with exact parameter counts."""
    records, rows = [], []
    for name, config in SIZES.items():
        weights, kv = config.nbytes(2.0), config.kv_nbytes_per_token(2.0)
        nbytes = {"bf16_bytes": weights, "kv_bytes_per_token": kv}
        records.append({"model": name} | picked(config, FIELDS) | nbytes)
        shape = f"{config.n_layers:,}|{config.dim:,}|{config.n_heads}:{config.n_kv_heads}|{config.ffn_dim:,}"
        rows.append(f"{name}|{config.n_params:,}|{shape}|{weights / 1e9:,.1f}|{kv / 1024:,.0f}")
    if as_json:
        print_json(records)
        return
    print_rows("model|parameters|layers|dim|heads:kv|ffn|bf16 GB|KV KiB/token", rows)
    print("Weights in GB (10^9 bytes), KV cache in KiB (1,024 bytes), both in bf16.")
    print("3B and 1B tie their embeddings.")
