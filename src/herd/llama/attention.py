"""The two attentions training needs: causal, and causal within packed documents.

`Attend` is how a caller hands attention to the model: ``attend(layer, q_BTHK, k_BTGK, v_BTGK) -> out_BTHK``. Training
uses the functions here; the engine brings its own with a cache behind it. The model never knows.

Shapes: B batch, T time, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's fused attention on Herd's axis order, KV heads shared by groups of query heads (GQA)."""
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def causal(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Every token sees itself and all before it in its row."""
    return sdpa(q_BTHK, k_BTGK, v_BTGK, causal=True)


def packed(documents_BT: Tensor) -> Attend:
    """Every token sees itself and what came before it *in its own document*.

    ``documents_BT`` holds a document number per token (any integers; equal = same document). Llama 3 trains long
    contexts this way (paper section 3.2): no attention across documents packed into one row.
    """
    T = documents_BT.shape[1]
    same_B1TT = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
    order_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    mask_B1TT = same_B1TT & order_TT

    def attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        return sdpa(q_BTHK, k_BTGK, v_BTGK, mask=mask_B1TT)

    return attend


def packed_positions(documents_BT: Tensor) -> Tensor:
    """Positions that restart at 0 with every document of a packed row: (B, T) int64."""
    B, T = documents_BT.shape
    index_BT = torch.arange(T, device=documents_BT.device).expand(B, T)
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_BT - torch.where(starts_BT, index_BT, 0).cummax(dim=1).values
