"""Attention over a paged KV cache, fused with writing to it: a native CPU kernel, and plain torch elsewhere.

The new tokens of all sequences are flattened into one row of N, and a `Ragged` maps them to their sequences.
Their keys and values are written to the cache, and then each token attends to its own sequence up to itself.
So a decode step, a chunk of a prompt and a mixture of both are one call. `page_layout.py` describes a page.

Shapes: N new tokens, H query heads, G KV heads, R = H / G, K head dim, P pages, L layers, S cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build
from .page_layout import BLOCK, LANES, PAGE, head_bytes, value_width

QUERY_BLOCK = 256
"""Queries per mask in plain torch, so that no mask is (prompt x context)."""
WIDEST = 512
"""The native kernel's largest head dim."""


@dataclass(frozen=True)
class Ragged:
    """The sequences of the N new tokens, made once per step and used by every layer.

    ``tables`` (sequences, pages) int32 has the page of every `PAGE` tokens. ``rows`` (B, 4) int64 has a row
    for each sequence with new tokens: its line in ``tables``, the index of its first new token among the N,
    their number, and the position of the first in the sequence. Both are on the CPU.
    """

    tables: Tensor
    rows: Tensor
    device: torch.device

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The page of each new token and its index within the page, (N,) each."""
        pages, places = [], []
        for line, _, n, position in self.rows.tolist():
            positions = torch.arange(position, position + n)
            pages.append(self.tables[line, positions // PAGE])
            places.append(positions % PAGE)
        return torch.cat(pages).long().to(self.device), torch.cat(places).to(self.device)

    @cached_property
    def singles(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of sequences with one new token: their indices among the N, pages (B, n), and the keys they see."""
        rows = self.rows[self.rows[:, 2] == 1]
        if not len(rows):
            return None
        n = int(rows[:, 3].max()) // PAGE + 1
        pages_Bn = self.tables[rows[:, 0], :n].long()
        own = torch.arange(n) <= rows[:, 3:] // PAGE  # later entries of a line are undefined
        pages_Bn = torch.where(own, pages_Bn, pages_Bn[:, :1])
        seen_BS = torch.arange(n * PAGE) <= rows[:, 3:]
        return rows[:, 1].to(self.device), pages_Bn.to(self.device), seen_BS.to(self.device)


def paged_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, pool: Tensor, ragged: Ragged, layer: int
) -> Tensor:
    """Write k and v into ``pool`` (P, L, G, bytes) uint8 and return softmax(q·k / sqrt(K)) v, (N, H, K).

    The size of a page tells the cache's dtype. In an int8 cache queries are rounded as keys are, and the
    native kernel rounds softmax weights to 16 bits, page by page: about 5e-5 of the result.
    """
    if _native(q_NHK, k_NGK, v_NGK, pool):
        return torch.ops.herd_native.paged_attention(
            q_NHK.contiguous(), _dense(k_NGK), _dense(v_NGK), pool, ragged.tables, ragged.rows, layer
        )
    return plain_paged_attention(q_NHK, k_NGK, v_NGK, pool, ragged, layer)


def plain_paged_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, pool: Tensor, ragged: Ragged, layer: int
) -> Tensor:
    """Compute `paged_attention` in plain torch: gather the pages, then run torch's own attention on them."""
    H, K = q_NHK.shape[1:]
    G = k_NGK.shape[1]
    write(pool, layer, *ragged.places, k_NGK, v_NGK)
    if _kind(pool, K) == "int8":
        q_NHK = dequantize(*quantize(q_NHK), q_NHK.dtype)
    out_NHK = torch.empty_like(q_NHK)
    if ragged.singles is not None:
        tokens_B, pages_Bn, seen_BS = ragged.singles
        held = read(pool, layer, pages_Bn.flatten(), K, q_NHK.dtype)
        # values beyond a sequence's end may be NaN, and 0 x NaN is NaN
        k_BSGK, v_BSGK = (
            torch.where(seen_BS[..., None, None], x.unflatten(0, seen_BS.shape), 0) for x in held
        )
        # the R query heads of a KV head are consecutive, so they are R queries of one head
        out_BGRK = F.scaled_dot_product_attention(
            q_NHK[tokens_B].unflatten(1, (G, H // G)),
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            attn_mask=seen_BS[:, None, None],
        )
        out_NHK[tokens_B] = out_BGRK.flatten(1, 2)
    for line, start, n, position in ragged.rows.tolist():
        if n == 1:
            continue
        pages_n = ragged.tables[line, : (position + n - 1) // PAGE + 1].long().to(pool.device)
        k_SGK, v_SGK = (x[: position + n] for x in read(pool, layer, pages_n, K, q_NHK.dtype))
        for t in range(0, n, QUERY_BLOCK):
            stop = min(t + QUERY_BLOCK, n)
            S = position + stop
            seen_tS = (
                torch.arange(S, device=pool.device)
                <= torch.arange(position + t, S, device=pool.device)[:, None]
            )
            out_HtK = F.scaled_dot_product_attention(
                q_NHK[start + t : start + stop].transpose(0, 1)[None],
                k_SGK[:S].transpose(0, 1)[None],
                v_SGK[:S].transpose(0, 1)[None],
                attn_mask=seen_tS,
                enable_gqa=H != G,
            )[0]
            out_NHK[start + t : start + stop] = out_HtK.transpose(0, 1)
    return out_NHK


def write(pool: Tensor, layer: int, pages_N: Tensor, places_N: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> None:
    """Write each token's keys and values into its page."""
    K = k_NGK.shape[2]
    views = _views(pool, layer, K)
    if views.key_scales is not None and views.value_scales is not None:
        k_NGK, key_scales_NGb = quantize(k_NGK)
        v_NGK, value_scales_NGb = quantize(v_NGK)
        k_NGK = (k_NGK.short() + 128).to(torch.uint8)
        views.key_scales[pages_N, :, :, places_N] = key_scales_NGb
        views.value_scales[pages_N, :, :, places_N] = value_scales_NGb
    c, (w, p) = views.keys.shape[-1], views.values.shape[-2:]
    keys, values = k_NGK.to(views.keys.dtype), v_NGK.to(views.values.dtype)
    views.keys[pages_N, :, places_N // LANES, :, places_N % LANES] = keys.unflatten(2, (K // c, c))
    views.values[pages_N, :, :, places_N // p, :, places_N % p] = values.unflatten(2, (K // w, w))


def read(pool: Tensor, layer: int, pages_n: Tensor, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values (n * PAGE, G, K) of whole pages, dequantized if they are int8."""
    views = _views(pool, layer, K)
    k_SGK = views.keys[pages_n].permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(0, 2)
    v_SGK = views.values[pages_n].permute(0, 3, 5, 1, 2, 4).flatten(4).flatten(0, 2)
    if views.key_scales is None or views.value_scales is None:
        return k_SGK.to(dtype), v_SGK.to(dtype)
    scales = [x[pages_n].permute(0, 3, 1, 2).flatten(0, 1) for x in (views.key_scales, views.value_scales)]
    return dequantize(k_SGK.to(dtype) - 128, scales[0], dtype), dequantize(v_SGK, scales[1], dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 (..., K) and a bf16 scale (..., K / BLOCK) per block, whose largest value becomes ±127."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1) / 127).to(torch.bfloat16)
    steps = (blocks / scale.float()[..., None]).round().nan_to_num(0).clamp(-127, 127)
    return steps.to(torch.int8).flatten(-2), scale


def dequantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values that `quantize` rounded."""
    return (x.unflatten(-1, (-1, BLOCK)).to(dtype) * scale.to(dtype)[..., None]).flatten(-2)


class _Views(NamedTuple):
    """One layer of all pages as views.

    Keys (P, G, PAGE / 16, K / c, 16, c), values (P, G, K / w, PAGE / p, w, p), scales (P, G, K / BLOCK,
    PAGE).
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


def _views(pool: Tensor, layer: int, K: int) -> _Views:
    kind, w = _kind(pool, K), value_width(K)
    size = pool.shape[3] // 2
    halves = pool[:, layer, :, :size], pool[:, layer, :, size:]
    key_type, value_type = {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "int8": (torch.uint8, torch.int8),
    }[kind]
    n = PAGE * K * key_type.itemsize
    c = 4 // key_type.itemsize
    keys = halves[0][..., :n].view(key_type).unflatten(-1, (PAGE // LANES, K // c, LANES, c))
    p = 2 if kind == "int8" else 1
    values = halves[1][..., :n].view(value_type).unflatten(-1, (K // w, PAGE // p, w, p))
    if kind != "int8":
        return _Views(keys, values, None, None)
    scales = [half[..., n:].view(torch.bfloat16).unflatten(-1, (K // BLOCK, PAGE)) for half in halves]
    return _Views(keys, values, *scales)


def _kind(pool: Tensor, K: int) -> str:
    kinds = ("fp32", "bf16", "int8") if K % BLOCK == 0 else ("fp32", "bf16")
    return next(kind for kind in kinds if head_bytes(kind, K) == pool.shape[3])


def _native(q: Tensor, k: Tensor, v: Tensor, pool: Tensor) -> bool:
    return (
        pool.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[2] % LANES == 0
        and q.shape[2] <= WIDEST
        and build.ready()
    )


def _dense(x_NGK: Tensor) -> Tensor:
    """Return x with heads and channels contiguous.

    Tokens may be apart, as in a slice of a fused projection.
    """
    return x_NGK if x_NGK.stride()[1:] == (x_NGK.shape[2], 1) else x_NGK.contiguous()
