"""How a page of the KV cache is laid out, in numbers: torch-free, so that planners can count bytes.

A page holds `PAGE` tokens of one sequence, for all layers and KV heads, keys and values: (L, G, head bytes). What a
KV head takes of it (K channels; w of them side by side among values; c of them fill four bytes):

    keys           (PAGE / 16, K / c, 16, c)    16 tokens abreast: one load feeds sixteen scores, with no sum across it
    key scales     (K / 32, PAGE) bf16          int8 only: one for 32 channels of a token
    values         (K / w, PAGE / p, w, p)      read p tokens at a time (two in int8, else one), w channels of each
    value scales   (K / 32, PAGE) bf16          int8 only

int8 keys are stored plus 128: processors multiply unsigned bytes by signed ones.
"""

from __future__ import annotations

PAGE = 64
"""Tokens of a page: wide enough that reading one is a long stride, narrow enough that its last one wastes little."""
LANES = 16
"""Tokens that stand abreast in the keys."""
BLOCK = 32
"""Channels that share a scale in int8."""

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 2.0 / BLOCK}
"""Bytes a value, its share of a scale included."""


def head_bytes(kind: str, head_dim: int) -> int:
    """Bytes of one KV head's keys and values in one page."""
    return round(2 * PAGE * head_dim * BYTES[kind])


def value_width(head_dim: int) -> int:
    """Channels side by side among the values: as many of 32, 16 or all as divide the head."""
    return next(w for w in (2 * LANES, LANES, head_dim) if head_dim % w == 0)
