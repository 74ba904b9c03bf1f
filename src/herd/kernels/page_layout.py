"""The layout of a page of the KV cache in numbers, without torch, so that planners can count bytes.

A page stores keys and values of `PAGE` tokens of one sequence, for all layers and KV heads: (L, G, head
bytes). One KV head of K channels takes the following, where w channels are adjacent among the values and c
channels fill four bytes:

    keys           (PAGE / 16, K / c, 16, c)    16 tokens side by side: one load feeds 16 scores
    key scales     (K / 32, PAGE) bf16          int8 only: one per 32 channels of a token
    values         (K / w, PAGE / p, w, p)      p tokens at a time (two in int8, else one), w channels of each
    value scales   (K / 32, PAGE) bf16          int8 only

int8 keys are stored with 128 added, because processors multiply unsigned bytes by signed ones.
"""

from __future__ import annotations

PAGE = 64
"""Tokens per page.

That is enough for long contiguous reads, and few enough that a sequence's last page wastes little.
"""
LANES = 16
"""Tokens side by side in the keys."""
BLOCK = 32
"""Channels that share a scale in an int8 cache."""

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 2.0 / BLOCK}
"""Bytes per value, its share of a scale included."""


def head_bytes(kind: str, head_dim: int) -> int:
    """Return the bytes of one KV head's keys and values in one page."""
    return round(2 * PAGE * head_dim * BYTES[kind])


def value_width(head_dim: int) -> int:
    """Return the channels side by side among the values: 32 or 16 if they divide the head, else all."""
    return next(w for w in (2 * LANES, LANES, head_dim) if head_dim % w == 0)
