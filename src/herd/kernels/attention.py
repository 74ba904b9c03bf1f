"""Causal attention within documents for training: a native CPU kernel, and torch's own attention elsewhere.

The kernel (`native/attention.cpp`) does not read keys that a query may not see (later ones and other
documents), so packed rows cost as much as their documents. torch's CPU attention needs a mask and does T²
work.

Shapes: B batch, T time, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import build

LANES = 16  # fp32 values in the widest vector: head dims must be a multiple


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """Return softmax(q·k / sqrt(K)) v of query t over keys ``starts[t]``..t, (B, T, H, K).

    ``starts_BT`` int64 is the first token of each token's document and must not decrease along a row
    (default: 0 everywhere). Each KV head serves a group of query heads.
    """
    if _native(q_BTHK, k_BTGK, v_BTGK):
        kind = q_BTHK.device.type
        if torch.is_autocast_enabled(kind):
            q_BTHK, k_BTGK, v_BTGK = (x.to(torch.get_autocast_dtype(kind)) for x in (q_BTHK, k_BTGK, v_BTGK))
        return _Attention.apply(q_BTHK, k_BTGK, v_BTGK, starts_BT)
    return plain_attention(q_BTHK, k_BTGK, v_BTGK, starts_BT)


def plain_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, starts_BT: Tensor | None = None
) -> Tensor:
    """Compute `attention` by torch's own operator, with a (B, T, T) mask if there are documents."""
    mask = None if starts_BT is None else visible(starts_BT)[:, None]
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def visible(starts_BT: Tensor) -> Tensor:
    """Return a mask of the keys that each query sees, (B, T, T) bool."""
    key_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return (key_T >= starts_BT[:, :, None]) & (key_T <= key_T[:, None])


def _native(q: Tensor, k: Tensor, v: Tensor) -> bool:
    fits = (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] % LANES == 0
        and q.shape[0] * k.shape[2] >= _threads()  # a unit of work is one KV head of one row
    )
    return fits and build.ready() and _register()


@build.constant
def _threads() -> int:
    return torch.get_num_threads()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, starts_BT: Tensor | None) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = q_BTHK.contiguous(), k_BTGK.contiguous(), v_BTGK.contiguous()
        starts_BT = None if starts_BT is None else starts_BT.contiguous()
        out_BTHK, lse_BHT = torch.ops.herd_native.attention(
            q_BTHK, k_BTGK, v_BTGK, starts_BT, q_BTHK.shape[-1] ** -0.5
        )
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, out_BTHK, lse_BHT, starts_BT)
        return out_BTHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *saved, starts_BT = ctx.saved_tensors
        scale = saved[0].shape[-1] ** -0.5
        return *torch.ops.herd_native.attention_backward(d_out.contiguous(), *saved, starts_BT, scale), None


_registered = False


@build.constant
def _register() -> bool:
    """Register the kernel's output shapes for torch.compile, once the native library is loaded."""
    global _registered
    if not _registered:
        torch.library.register_fake("herd_native::attention", _forward_shapes)
        torch.library.register_fake("herd_native::attention_backward", _backward_shapes)
        _registered = True
    return True


def _forward_shapes(q, k, v, starts, scale):
    B, T, H, _ = q.shape
    return torch.empty_like(q), q.new_empty((B, H, T), dtype=torch.float32)


def _backward_shapes(d_out, q, k, v, out, lse, starts, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
