"""Ranks: a byte-level BPE vocabulary as one mapping from token bytes to merge order.

Byte-pair encoding is fully described by which byte strings are tokens and in which order they were learned.
To encode, join the adjacent pair whose joined bytes have the lowest rank, leftmost first, until no joined
pair is a token. This is how tiktoken works and the content of Meta's ``tokenizer.model`` (lines of
``base64(token) rank``). Everything else, such as the merge list of `tokenizer.json`, can be computed from the
ranks.

**Merges from ranks.** Hugging Face's BPE needs pairs, tiktoken only joined bytes. They agree exactly if each
token lists one pair: the last one that BPE joins when it runs on the token's own bytes. The reason: if a
token T is formed in some text by joining x and y, no earlier merge crossed the ends of T, so the merges
inside were those that BPE makes on T's bytes alone. Hence (x, y) is that pair. A token that BPE does not
reach from its own bytes is never formed by merging, and gets no pair. It is only found as a whole piece,
because tiktoken looks pieces up first (``ignore_merges`` in `tokenizer.json`).

Sources: tiktoken's ``_educational.py`` and ``lib.rs``, and for the file llama-models
``models/llama3/tokenizer.py``.
"""

from __future__ import annotations

import base64
import binascii
from functools import cache
from pathlib import Path

from ..errors import TokenizerError

Ranks = dict[bytes, int]


def read_ranks(path: Path) -> Ranks:
    """Read Meta's ``tokenizer.model``. Raises `TokenizerError`, which names the file and the line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}); give a tokenizer.model") from error
    if not data.strip():
        raise TokenizerError(f"{path}: empty; a ranks file has one line 'base64 rank' per token")
    ranks: Ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token_base64, rank_text = line.split()
            token, rank = base64.b64decode(token_base64, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            hint = (
                "SentencePiece models (Llama 2) are not read"
                if b"<unk>" in data[:64]
                else "is this a ranks file?"
            )
            raise TokenizerError(f"{path}:{number}: {line[:40]!r} is not 'base64 rank'; {hint}") from error
        if token in ranks:
            raise TokenizerError(f"{path}:{number}: token {token!r} has two ranks, {ranks[token]} and {rank}")
        ranks[token] = rank
    check_ranks(ranks, str(path))
    return ranks


def check_ranks(ranks: Ranks, source: str) -> None:
    """Raise `TokenizerError` unless the ranks are 0..n-1, no token is empty and all 256 bytes are tokens."""
    if b"" in ranks:
        raise TokenizerError(f"{source}: rank {ranks[b'']} is an empty token; remove it")
    by_rank = sorted(ranks.values())
    for expected, rank in enumerate(by_rank):
        if rank != expected:
            what = f"rank {rank} is there twice" if rank < expected else f"rank {expected} is missing"
            raise TokenizerError(
                f"{source}: {what}; {len(ranks)} tokens have the ranks 0 to {len(ranks) - 1} once each"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{source}: {len(missing)} of the 256 single bytes are not tokens (first: 0x{missing[0]:02x});"
            " without them some text could not be encoded"
        )


def ranks_bytes(ranks: Ranks) -> bytes:
    """Return the content of ``tokenizer.model``, in rank order. Meta's ranks give Meta's file."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)


def last_merge(token: bytes, ranks: Ranks) -> tuple[bytes, bytes] | None:
    """Return the pair that BPE joins last on a token's bytes, or None if it never reaches the token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        joined = parts[best] + parts[best + 1]
        if joined not in ranks:
            return None
        parts[best : best + 2] = [joined]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def merges(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """Return the equivalent merge list in rank order: one pair per token that merging reaches."""
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = (last_merge(token, ranks) for token in in_order)
    return [pair for pair in pairs if pair is not None]


@cache
def byte_characters() -> tuple[str, ...]:
    """Return GPT-2's printable character for each byte, as in `tokenizer.json`: byte 0x20 is "Ġ"."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@cache
def character_bytes() -> dict[str, int]:
    """Return the inverse of `byte_characters`."""
    return {character: byte for byte, character in enumerate(byte_characters())}


def spell(token: bytes) -> str:
    """Return a token's bytes as `tokenizer.json` spells them."""
    characters = byte_characters()
    return "".join([characters[byte] for byte in token])


def unspell(spelling: str) -> bytes:
    """Return the bytes of a spelling. Raises KeyError for a character that stands for no byte."""
    table = character_bytes()
    return bytes([table[character] for character in spelling])
