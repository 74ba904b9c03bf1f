"""Extend a BPE vocabulary for a new language by continuing the training of its merges on the language's text.

New merges come after all old ones, so a text is first split exactly as before, and new tokens only join the
pieces. A new token consists of bytes outside ASCII that occur in the new text. So texts without the new
language's characters keep their ids, and old ids keep their meaning.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from ..errors import TokenizerError
from .library_tokenizer import Library, LibraryTokenizer
from .ranks_tokenizer import RanksTokenizer
from .tokenizer import Tokenizer
from .tokenizer_json import CHAT_TEMPLATE, tokenizer_json

MIN_COUNT = 2
"""A pair must occur this often to become a token."""


@dataclass(frozen=True)
class ExtendedVocabulary:
    """A tokenizer with more tokens, and for each new id the old ids that it replaces (``pieces``)."""

    tokenizer: Tokenizer
    pieces: list[list[int]]


def extend_vocabulary(tokenizer: Tokenizer, texts: Iterable[str], n_new: int) -> ExtendedVocabulary:
    """Add up to ``n_new`` tokens that are learned from ``texts``.

    Raises `TokenizerError` for a tokenizer that is not byte-level BPE.
    """
    if isinstance(tokenizer, RanksTokenizer):
        tokenizer = _as_library(tokenizer)
    assert isinstance(tokenizer, LibraryTokenizer)
    content = json.loads(tokenizer.to_json())
    model: dict[str, Any] = content["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(content["decoder"]):
        raise TokenizerError(f"{tokenizer.where}: is {model['type']}; only byte-level BPE can be extended")
    words = _words(tokenizer, texts)
    spelled = {id_: word for word, id_ in model["vocab"].items()}
    # added tokens that are not listed here get ids after the vocabulary, and it becomes longer
    ids = model["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    first = tokenizer.vocab_size
    pieces: dict[int, list[int]] = {}
    merges: list[tuple[str, str]] = []
    for left, right, join in _Pairs(words, tokenizer).best():
        if len(pieces) == n_new:
            break
        word = spelled[left] + spelled[right]
        # an old token that no merge leads to from here: joining would give old text another id
        if word in ids:
            continue
        new = first + len(pieces)
        ids[word], spelled[new] = new, word
        pieces[new] = [*pieces.get(left, [left]), *pieces.get(right, [right])]
        merges.append((spelled[left], spelled[right]))
        join(new)
    old = model["merges"]
    as_text = bool(old) and isinstance(old[0], str)
    model["vocab"] = ids
    model["merges"] = [*old, *(" ".join(pair) if as_text else list(pair) for pair in merges)]
    made = tokenizer.rebuilt(content).with_settings_of(tokenizer, where=f"{tokenizer.where}, extended")
    return ExtendedVocabulary(made, list(pieces.values()))


def _as_library(tokenizer: RanksTokenizer) -> LibraryTokenizer:
    """Return a tokenizer of Llama 3's kind as one of the `tokenizers` library, whose ids may have gaps.

    Ranks cannot be continued: their special tokens follow them, and would get other ids.
    """
    content = tokenizer_json(tokenizer.ranks, tokenizer.special_tokens, tokenizer.bos_id)
    names = {role.removesuffix("_token"): name for role, name in tokenizer.token_names.items()}
    made = LibraryTokenizer(Library.from_str(content), **names, add_bos=tokenizer.add_bos, vocabulary=None)
    return made.with_settings(
        stop_ids=tokenizer.own_stop_ids,
        chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
        tool_template=tokenizer.tool_template,
        where=tokenizer.where,
    )


def _words(tokenizer: LibraryTokenizer, texts: Iterable[str]) -> Counter[tuple[int, ...]]:
    """Return the number of times that each word occurs, with words as ids of the old vocabulary."""
    library = Library.from_str(tokenizer.to_json())
    counts: Counter[str] = Counter()
    for text in texts:
        text = library.normalizer.normalize_str(text) if library.normalizer else text
        counts.update(word for word, _ in library.pre_tokenizer.pre_tokenize_str(text))
    return Counter(
        {tuple(token.id for token in library.model.tokenize(word)): n for word, n in counts.items()}
    )


class _Pairs:
    """The pairs of neighbouring tokens in words, with their counts, while pairs are being joined."""

    def __init__(self, words: Counter[tuple[int, ...]], tokenizer: Tokenizer) -> None:
        self._words = [list(word) for word in words]
        self._counts = list(words.values())
        self._foreign: dict[int, bool] = {}
        self._tokenizer = tokenizer
        self._total: Counter[tuple[int, int]] = Counter()
        self._where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for number, word in enumerate(self._words):
            for pair in pairwise(word):
                self._total[pair] += self._counts[number]
                self._where[pair].add(number)
        self._heap = [(-n, *pair) for pair, n in self._total.items()]
        heapq.heapify(self._heap)

    def best(self) -> Any:
        """Yield (left, right, a function that joins them as a new id), the most frequent pair first."""
        while self._heap:
            count, left, right = heapq.heappop(self._heap)
            now = self._total.get((left, right), 0)
            if now != -count:
                if now:
                    heapq.heappush(self._heap, (-now, left, right))
                continue
            if now < MIN_COUNT:
                return
            if self._is_foreign(left) and self._is_foreign(right):
                yield left, right, partial(self._join, left, right)

    def _is_foreign(self, id_: int) -> bool:
        """Return whether a token has only bytes outside ASCII. Joined tokens are made of such tokens."""
        if id_ not in self._foreign:
            self._foreign[id_] = all(byte >= 0x80 for byte in self._tokenizer.token_bytes(id_))
        return self._foreign[id_]

    def _join(self, left: int, right: int, new: int) -> None:
        self._foreign[new] = True
        changed: set[tuple[int, int]] = set()
        for number in self._where.pop((left, right)):
            word, count = self._words[number], self._counts[number]
            for pair in pairwise(word):
                self._total[pair] -= count
                self._where[pair].discard(number)
            joined: list[int] = []
            for id_ in word:
                if joined and joined[-1] == left and id_ == right:
                    joined[-1] = new
                else:
                    joined.append(id_)
            self._words[number] = joined
            for pair in pairwise(joined):
                self._total[pair] += count
                self._where[pair].add(number)
                changed.add(pair)
        del self._total[left, right]
        for pair in changed:
            if new in pair:
                heapq.heappush(self._heap, (-self._total[pair], *pair))
