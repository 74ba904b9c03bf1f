"""Contamination: find the test items that share 13 words in a row with a training corpus.

Test sets are small and corpora are large. So the 13-grams of all items are stored as sorted 64-bit numbers,
and the corpus is read once, document by document. Memory depends only on the test sets and the longest chunk.
Words are runs of letters and digits, compared without case. Source: Brown et al., arXiv 2005.14165, appendix
C (13-grams).

A word is hashed by BLAKE2, and a 13-gram is a polynomial of its words' hashes modulo 2^64. For 10^9 13-grams
compared with 10^6, the probability of a chance match is below one in ten thousand.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .tasks.task import Generate, Item, Rank

WORDS = 13
PIECE_WORDS = 1 << 18  # longer documents are read in chunks of this size that overlap by WORDS - 1

_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15
_POWERS = np.array([pow(_BASE, k, 1 << 64) for k in range(WORDS)], dtype=np.uint64)


@dataclass(frozen=True)
class Overlap:
    """The overlap of a test set with a corpus, by ids of items.

    Items in ``hit`` have a 13-gram in the corpus, items in ``clean`` have none. Items in ``short`` have fewer
    than 13 words, so nothing is known about them. ``share_of_grams`` is the fraction of all 13-grams that
    occur in the corpus.
    """

    corpus: str
    hit: Sequence[str]
    clean: Sequence[str]
    short: Sequence[str]
    share_of_grams: float

    @property
    def share(self) -> float:
        """Fraction of contaminated items among those that are long enough."""
        return len(self.hit) / max(1, len(self.hit) + len(self.clean))

    def record(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Return the entry of a score's ``detail``, given the ``values`` of the items by id."""
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


def overlaps(tests: Mapping[str, Sequence[Item]], corpus: Iterable[str], label: str) -> dict[str, Overlap]:
    """Return the overlap of each test set with a corpus of texts.

    Raises `DataError` if the corpus is empty.
    """
    sets = {name: {item.id: grams(own_text(item)) for item in items} for name, items in tests.items()}
    every = [gram for items in sets.values() for gram in items.values()]
    table = np.unique(np.concatenate(every)) if every else np.zeros(0, np.uint64)
    found = np.zeros(len(table), dtype=bool)
    n_read = 0
    for text in corpus:
        for piece in _pieces(text):
            n_read += len(piece)
            mark(table, found, hashes(piece))
    if not n_read:
        raise DataError(f"{label}: the corpus has no text; give the training text")
    return {name: _overlap(items, table, found, label) for name, items in sets.items()}


def mark(table: NDArray[np.uint64], found: NDArray[np.bool_], seen: NDArray[np.uint64]) -> None:
    """Set ``found`` to True at the entries of ``table`` (sorted) that occur in ``seen``."""
    if len(table) and len(seen):
        at = np.searchsorted(table, seen)
        at[at == len(table)] = 0
        found[at[table[at] == seen]] = True


def own_text(item: Item) -> str:
    """Return the question with its gold continuation, or the text to score."""
    request = item.request
    if isinstance(request, Rank):
        gold = item.gold if isinstance(item.gold, int) else 0
        return "".join(request.pairs[gold])
    if isinstance(request, Generate):
        prompt = request.prompt
        return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    return request.text


def grams(text: str) -> NDArray[np.uint64]:
    """Return all 13-grams of a text as numbers."""
    return hashes(_WORD.findall(text.lower()))


def hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    """Return a hash for every 13 words in a row, none for fewer words."""
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
    """Yield the words of a text, a bounded number at a time."""
    piece: list[str] = []
    for word in _WORD.finditer(text):
        piece.append(word[0].lower())
        if len(piece) == PIECE_WORDS:
            yield piece
            piece = piece[-(WORDS - 1) :]
    if piece:
        yield piece


def _overlap(
    items: Mapping[str, NDArray[np.uint64]], table: NDArray[np.uint64], found: NDArray[np.bool_], label: str
) -> Overlap:
    """Return the overlap of a test set, given the 13-grams of its items by id."""
    hits = {id_: found[np.searchsorted(table, gram)] for id_, gram in items.items()}
    return Overlap(
        label,
        [id_ for id_, hit in hits.items() if hit.any()],
        [id_ for id_, hit in hits.items() if len(hit) and not hit.any()],
        [id_ for id_, hit in hits.items() if not len(hit)],
        sum(int(hit.sum()) for hit in hits.values()) / max(1, sum(map(len, hits.values()))),
    )
