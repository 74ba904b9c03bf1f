"""The two attention functions of training: causal, and causal within packed documents.

A caller passes attention to the model as an `Attend`: ``attend(layer, q_BTHK, k_BTGK, v_BTGK) -> out_BTHK``.
Training uses the functions here. The engine passes its own, which reads a KV cache.

Shapes: B batch, T time, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Apply torch's fused attention to Herd's axis order. Groups of query heads share KV heads (GQA)."""
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def causal(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Let every token attend to itself and to all earlier tokens of its row."""
    return attention(q_BTHK, k_BTGK, v_BTGK)


def packed(documents_BT: Tensor) -> Attend:
    """Return an attention in which every token attends to itself and to earlier tokens *of its own document*.

    ``documents_BT`` are the document numbers of tokens (integers, equal for tokens of one document). Llama 3
    trains long contexts this way (paper section 3.2): no attention across documents that are packed into one
    row.
    """
    if _in_runs(documents_BT):
        index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
        starts_BT = index_T - packed_positions(documents_BT)
        return lambda layer, q_BTHK, k_BTGK, v_BTGK: attention(q_BTHK, k_BTGK, v_BTGK, starts_BT)

    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask_B1TT = (same_BTT & same_BTT.new_ones(same_BTT.shape[1:]).tril())[:, None]
    return lambda layer, q_BTHK, k_BTGK, v_BTGK: sdpa(q_BTHK, k_BTGK, v_BTGK, mask=mask_B1TT)


def _in_runs(documents_BT: Tensor) -> bool:
    """Return whether no document continues after another one has started in its row."""
    changes_B = (documents_BT.diff(dim=1) != 0).sum(1)
    kinds_B = (documents_BT.sort(dim=1).values.diff(dim=1) != 0).sum(1)
    return bool((changes_B == kinds_B).all())


def packed_positions(documents_BT: Tensor) -> Tensor:
    """Return positions that restart at 0 with every document of a packed row: (B, T) int64."""
    B, T = documents_BT.shape
    index_BT = torch.arange(T, device=documents_BT.device).expand(B, T)
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_BT - torch.where(starts_BT, index_BT, 0).cummax(dim=1).values
