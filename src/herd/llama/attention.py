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

from ..kernels.attention import attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def sdpa(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
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
    return attention(q_BTHK, k_BTGK, v_BTGK)


def packed(documents_BT: Tensor) -> Attend:
    """Every token sees itself and what came before it *in its own document*.

    ``documents_BT`` holds a document number per token (any integers; equal = same document). Llama 3 trains long
    contexts this way (paper section 3.2): no attention across documents packed into one row.
    """
    if _in_runs(documents_BT):
        starts_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device) - packed_positions(
            documents_BT
        )
        return lambda layer, q_BTHK, k_BTGK, v_BTGK: attention(q_BTHK, k_BTGK, v_BTGK, starts_BT)

    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask_B1TT = (same_BTT & same_BTT.new_ones(same_BTT.shape[1:]).tril())[:, None]
    return lambda layer, q_BTHK, k_BTGK, v_BTGK: sdpa(q_BTHK, k_BTGK, v_BTGK, mask=mask_B1TT)


def _in_runs(documents_BT: Tensor) -> bool:
    """Whether no document comes back after another one began in its row."""
    changes_B = (documents_BT.diff(dim=1) != 0).sum(1)
    kinds_B = (documents_BT.sort(dim=1).values.diff(dim=1) != 0).sum(1)
    return bool((changes_B == kinds_B).all())


def packed_positions(documents_BT: Tensor) -> Tensor:
    """Positions that restart at 0 with every document of a packed row: (B, T) int64."""
    B, T = documents_BT.shape
    index_BT = torch.arange(T, device=documents_BT.device).expand(B, T)
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_BT - torch.where(starts_BT, index_BT, 0).cummax(dim=1).values
