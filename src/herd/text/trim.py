"""Make a smaller vocabulary of a BPE tokenizer: keep the merges that a text needs most, or the first ones.

Byte-pair encoding applies merges in a fixed order, and a token is only reached through the tokens that it is
merged from. So a token is kept together with those. A word whose tokens are all kept is then split as before,
because each merge that leads to them is still there and still comes first. Other words come back too, in more
tokens. Without a text, a prefix of the merges is kept.

The tokens that remain get new ids in the order of the old ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import TokenizerError
from .ranks import last_merge
from .ranks_tokenizer import RanksTokenizer
from .tokenizer import Tokenizer

T = TypeVar("T", bound=Tokenizer)


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A tokenizer with fewer tokens.

    ``kept`` are the old ids of its tokens, ascending, so the token of new id ``n`` was ``kept[n]``.
    ``pieces`` has an entry for every old id: the new ids that its token is now split into, one if it is kept.
    """

    tokenizer: Tokenizer
    kept: list[int]
    pieces: list[list[int]]


def trim_vocabulary(
    tokenizer: Tokenizer, size: int, counts: Mapping[int, int] | None = None
) -> TrimmedVocabulary:
    """Keep special tokens, bytes, and as many merges as ``size`` tokens have room for.

    ``counts`` are the occurrences of ids in a text: tokens that occur more often are kept first, then those
    that are merged first. Raises `TokenizerError` if ``size`` is larger than the vocabulary or has no room
    for a merge, and for a tokenizer that is not BPE.
    """
    if size > tokenizer.vocab_size:
        raise TokenizerError(
            f"vocab={size}: {tokenizer.where} has only {tokenizer.vocab_size:,} tokens; ask for fewer"
        )
    if isinstance(tokenizer, RanksTokenizer):
        return _trim_ranks(tokenizer, size, counts or {})
    return _trim_merges(tokenizer, size, counts or {})


def _choose(
    base: Iterable[int],
    in_order: Sequence[int],
    parts_of: Callable[[int], tuple[int, int] | None],
    size: int,
    counts: Mapping[int, int],
) -> set[int]:
    """Return ``size`` ids: ``base``, then the commonest ids that are merged, then the first of ``in_order``.

    ``parts_of`` returns the two ids that an id is merged from, or None if no merge leads to it.
    """
    kept = set(base)
    if size <= len(kept):
        raise TokenizerError(
            f"a vocabulary of {size:,} has no room for merges: its special tokens and bytes alone are "
            f"{len(kept):,}"
        )
    for id_ in sorted(counts, key=lambda id_: (-counts[id_], id_)):
        needed, left = set(), [id_]
        while left:
            one = left.pop()
            if one not in kept and one not in needed:
                needed.add(one)
                left += parts_of(one) or ()
        if len(kept) + len(needed) <= size:
            kept |= needed
    for id_ in in_order:
        if len(kept) == size:
            break
        if kept.issuperset(parts_of(id_) or ()):
            kept.add(id_)
    return kept


def _trim_ranks(tokenizer: RanksTokenizer, size: int, counts: Mapping[int, int]) -> TrimmedVocabulary:
    words = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    special = range(tokenizer.n_ranks, tokenizer.vocab_size)

    def parts_of(id_: int) -> tuple[int, int] | None:
        pair = last_merge(words[id_], tokenizer.ranks)
        return None if pair is None else (tokenizer.ranks[pair[0]], tokenizer.ranks[pair[1]])

    single = [id_ for id_, word in enumerate(words) if len(word) == 1]
    merged = [id_ for id_, word in enumerate(words) if len(word) > 1]
    used = {id_: count for id_, count in counts.items() if id_ < tokenizer.n_ranks}
    kept = sorted(_choose([*single, *special], merged, parts_of, size, used))
    new = {id_: number for number, id_ in enumerate(kept)}
    names = {name: new[id_] for name, id_ in tokenizer.special_tokens.items()}
    ranks = {words[id_]: number for id_, number in new.items() if id_ < tokenizer.n_ranks}
    small = _with_settings(RanksTokenizer(ranks, names), tokenizer, new)
    return TrimmedVocabulary(small, kept, [*small.pieces_of(words), *([new[id_]] for id_ in special)])


def _trim_merges(tokenizer: Tokenizer, size: int, counts: Mapping[int, int]) -> TrimmedVocabulary:
    from .library_tokenizer import LibraryTokenizer

    assert isinstance(tokenizer, LibraryTokenizer)
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"{tokenizer.where}: its model is {model['type']}; only BPE can be trimmed")
    ids: dict[str, int] = dict(model["vocab"])
    names = {token["content"]: token["id"] for token in content["added_tokens"]}
    parts: dict[int, tuple[int, int]] = {}  # of the first merge that leads to a token
    merges = [(ids[left], ids[right], ids[left + right]) for left, right in _pairs(model["merges"])]
    for left, right, both in merges:
        parts.setdefault(both, (left, right))
    parts = {id_: pair for id_, pair in parts.items() if id_ not in names.values()}
    base = (set(ids.values()) - parts.keys()) | set(names.values())
    used = {id_: count for id_, count in counts.items() if id_ in parts}
    kept = _choose(base, list(parts), parts.get, size, used)
    new = {id_: number for number, id_ in enumerate(sorted(kept))}
    first = {both: n for n, (*_, both) in reversed(list(enumerate(merges)))}
    last = max(first[id_] for id_ in kept & parts.keys())
    model["vocab"] = {word: new[id_] for word, id_ in ids.items() if id_ in kept}
    model["merges"] = [
        merge
        for merge, found in zip(model["merges"][: last + 1], merges, strict=False)
        if kept.issuperset(found)
    ]
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(content.get("post_processor"), new)
    made = tokenizer.rebuilt(content)
    dropped = {id_: word for word, id_ in ids.items() if id_ not in kept}
    pieces = {id_: [number] for id_, number in new.items()}
    pieces |= dict(zip(dropped, made.pieces_of(dropped.values()), strict=True))
    all_pieces = [pieces.get(id_, [0]) for id_ in range(tokenizer.vocab_size)]
    return TrimmedVocabulary(_with_settings(made, tokenizer, new), sorted(kept), all_pieces)


def _pairs(merges: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Yield the merges of a `tokenizer.json`, which are strings with a space or lists of two."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _with_settings(small: T, tokenizer: Tokenizer, new: Mapping[int, int]) -> T:
    """Return ``small`` with the settings of ``tokenizer``, whose ids ``new`` maps to its own."""
    stop_ids = [new[id_] for id_ in tokenizer.own_stop_ids]
    return small.with_settings_of(tokenizer, stop_ids=stop_ids, where=f"{tokenizer.where}, trimmed")


def _renumber(processor: Any, new: dict[int, int]) -> None:
    """Replace the ids of special tokens in a post-processor of a `tokenizer.json`, in place."""
    if isinstance(processor, list):
        for part in processor:
            _renumber(part, new)
    if not isinstance(processor, dict):
        return
    for key, value in processor.items():
        if key in ("sep", "cls"):
            processor[key] = [value[0], new[value[1]]]
        elif key == "special_tokens":
            for token in value.values():
                token["ids"] = [new[id_] for id_ in token["ids"]]
        else:
            _renumber(value, new)
