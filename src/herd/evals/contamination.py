"""Did the training corpus hold the test? Shared runs of 13 words, item by item, in one pass over the corpus.

The test sets are small and the corpus is not: the 13-grams of all items are kept as 64-bit numbers, sorted, and the
corpus streams by, a document at a time. Memory depends on the test sets and the longest piece alone. Words are runs of
letters and digits, capitals ignored. Source: Brown et al., arXiv 2005.14165, appendix C (13-grams).

A word is hashed by BLAKE2, a 13-gram is a polynomial of its words' hashes modulo 2^64; with some 10^9 13-grams read
against 10^6, a chance match is less likely than one in ten thousand.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .tasks.task import Generate, Item, Rank

WORDS = 13
PIECE_WORDS = 1 << 18
"""Longer documents are read in pieces of so many words, which overlap by `WORDS` - 1."""

_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15
_POWERS = np.array([pow(_BASE, k, 1 << 64) for k in range(WORDS)], dtype=np.uint64)


@dataclass(frozen=True)
class Overlap:
    """Of one test set: ``hit`` ids of items with a 13-gram in the corpus, ``clean`` those without, ``short`` those with
    fewer than 13 words, about which nothing can be said; ``share_of_grams`` of all its 13-grams."""

    corpus: str
    hit: Sequence[str]
    clean: Sequence[str]
    short: Sequence[str]
    share_of_grams: float

    @property
    def share(self) -> float:
        """Contaminated items among those long enough."""
        return len(self.hit) / max(1, len(self.hit) + len(self.clean))

    def record(self, values: Mapping[str, float]) -> dict[str, Any]:
        """For a score's ``detail``; ``values`` of the items give the score on the clean ones as well."""
        without = [values[i] for i in (*self.clean, *self.short) if i in values]
        return {
            "corpus": self.corpus,
            "share": self.share,
            "n_hit": len(self.hit),
            "n_clean": len(self.clean),
            "n_short": len(self.short),
            "share_of_grams": self.share_of_grams,
            "score_without": sum(without) / len(without) if without else None,
        }


@dataclass
class _Set:
    """A test set's 13-grams: item ids, and for each gram its number in the table of all."""

    ids: list[str] = field(default_factory=list)
    grams: list[NDArray[np.uint64]] = field(default_factory=list)


def overlaps(tests: Mapping[str, Sequence[Item]], corpus: Iterable[str], label: str) -> dict[str, Overlap]:
    """By test set's name. ``corpus``: texts, read once; ``label``: what it is called. DataError for an empty corpus."""
    sets = {
        name: _Set([i.id for i in items], [grams(own_text(i)) for i in items])
        for name, items in tests.items()
    }
    every = [gram for one in sets.values() for gram in one.grams]
    table = np.unique(np.concatenate(every)) if every else np.zeros(0, np.uint64)
    found = np.zeros(len(table), dtype=bool)
    n_read = 0
    for text in corpus:
        for piece in _pieces(text):
            n_read += len(piece)
            mark(table, found, hashes(piece))
    if not n_read:
        raise DataError(f"{label}: no text in this corpus; give the training text")
    return {name: _overlap(one, table, found, label) for name, one in sets.items()}


def mark(table: NDArray[np.uint64], found: NDArray[np.bool_], seen: NDArray[np.uint64]) -> None:
    """Set ``found`` where ``table`` (sorted) holds one of ``seen``."""
    if len(table) and len(seen):
        at = np.searchsorted(table, seen)
        at[at == len(table)] = 0
        found[at[table[at] == seen]] = True


def own_text(item: Item) -> str:
    """What is the item's own: question and gold continuation, or the text that is read."""
    request = item.request
    if isinstance(request, Rank):
        gold = item.gold if isinstance(item.gold, int) else 0
        return "".join(request.pairs[gold])
    if isinstance(request, Generate):
        prompt = request.prompt
        return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    return request.text


def grams(text: str) -> NDArray[np.uint64]:
    """All 13-grams of a text as numbers."""
    return hashes(_WORD.findall(text.lower()))


def hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    """A number for every 13 words in a row; empty for fewer words."""
    n = len(words) - WORDS + 1
    if n < 1:
        return np.zeros(0, dtype=np.uint64)
    each = np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))
    total = np.zeros(n, dtype=np.uint64)
    for k in range(WORDS):
        total += each[k : k + n] * _POWERS[k]
    return total


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _pieces(text: str) -> Iterator[list[str]]:
    """The words of a text, a bounded number at a time."""
    piece: list[str] = []
    for word in _WORD.finditer(text):
        piece.append(word[0].lower())
        if len(piece) == PIECE_WORDS:
            yield piece
            piece = piece[-(WORDS - 1) :]
    if piece:
        yield piece


def _overlap(one: _Set, table: NDArray[np.uint64], found: NDArray[np.bool_], label: str) -> Overlap:
    hits = [found[np.searchsorted(table, gram)] for gram in one.grams]
    n_grams = sum(map(len, hits))
    return Overlap(
        label,
        [i for i, hit in zip(one.ids, hits, strict=True) if hit.any()],
        [i for i, hit in zip(one.ids, hits, strict=True) if len(hit) and not hit.any()],
        [i for i, hit in zip(one.ids, hits, strict=True) if not len(hit)],
        sum(int(hit.sum()) for hit in hits) / max(1, n_grams),
    )
