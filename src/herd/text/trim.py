"""Make a smaller vocabulary of a BPE tokenizer: keep a prefix of its merges.

Byte-pair encoding applies merges in a fixed order, so a tokenizer with the first merges only splits text as
the whole one does before its later merges are applied. Nothing is lost: every text that the whole vocabulary
can express comes back, in more tokens. Choosing tokens by their frequency would not have this property,
because a token is only reached through all the tokens that it is merged from.

The tokens that remain get new ids in the order of the old ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import TokenizerError
from .ranks_tokenizer import RanksTokenizer
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A tokenizer with fewer tokens.

    ``kept`` are the old ids of its tokens, ascending, so the token of new id ``n`` was ``kept[n]``.
    ``first_piece`` has an entry for every old id: the new id of the same token, or of the first piece that a
    dropped token is now split into.
    """

    tokenizer: Tokenizer
    kept: list[int]
    first_piece: list[int]


def trim_vocabulary(tokenizer: Tokenizer, size: int) -> TrimmedVocabulary:
    """Keep special tokens, bytes, and as many of the first merges as ``size`` tokens have room for.

    Raises `TokenizerError` if ``size`` is larger than the vocabulary or has no room for a merge, and for a
    tokenizer that is not BPE.
    """
    if size > tokenizer.vocab_size:
        raise TokenizerError(
            f"vocab={size}: {tokenizer.where} has only {tokenizer.vocab_size:,} tokens; ask for fewer"
        )
    if isinstance(tokenizer, RanksTokenizer):
        return _trim_ranks(tokenizer, size)
    return _trim_merges(tokenizer, size)


def _trim_ranks(tokenizer: RanksTokenizer, size: int) -> TrimmedVocabulary:
    dropped = tokenizer.vocab_size - size
    n_ranks = tokenizer.n_ranks - dropped
    if n_ranks <= 256:
        raise _too_small(size, tokenizer.vocab_size - tokenizer.n_ranks + 256)
    ranks = {token: rank for token, rank in tokenizer.ranks.items() if rank < n_ranks}
    special = {name: id_ - dropped for name, id_ in tokenizer.special_tokens.items()}
    small = _with_settings_of(tokenizer, RanksTokenizer(ranks, special), lambda id_: id_ - dropped)
    words = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    first = [*range(n_ranks), *small.first_pieces(words[n_ranks:]), *range(n_ranks, size)]
    kept = [*range(n_ranks), *range(tokenizer.n_ranks, tokenizer.vocab_size)]
    return TrimmedVocabulary(small, kept, first)


def _trim_merges(tokenizer: Tokenizer, size: int) -> TrimmedVocabulary:
    from tokenizers import Tokenizer as Library

    from .library_tokenizer import LibraryTokenizer

    assert isinstance(tokenizer, LibraryTokenizer)
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"{tokenizer.where}: its model is {model['type']}; only BPE can be trimmed")
    old: dict[str, int] = dict(model["vocab"])
    names = {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    kept = (old.keys() - {left + right for left, right in merges}) | names.keys()
    if size <= len(kept):
        raise _too_small(size, len(kept))
    n_merges = 0
    for left, right in merges:
        if left + right not in kept and len(kept) == size:
            break
        kept.add(left + right)
        n_merges += 1
    all_ids = old | names
    ids = sorted(all_ids[word] for word in kept)
    new = {id_: number for number, id_ in enumerate(ids)}
    model["vocab"] = {word: new[id_] for word, id_ in old.items() if word in kept}
    model["merges"] = model["merges"][:n_merges]
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(content.get("post_processor"), new)
    library = Library.from_str(json.dumps(content, ensure_ascii=False))
    bos, eos, pad, unk = (tokenizer.token_names.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk"))
    made = LibraryTokenizer(library, bos=bos, eos=eos, pad=pad, unk=unk, add_bos=tokenizer.add_bos)
    dropped = {id_: word for word, id_ in old.items() if word not in kept}
    pieces = new | dict(zip(dropped, made.first_pieces(dropped.values()), strict=True))
    first = [pieces.get(id_, 0) for id_ in range(tokenizer.vocab_size)]
    return TrimmedVocabulary(_with_settings_of(tokenizer, made, new.__getitem__), ids, first)


def _with_settings_of(tokenizer: Tokenizer, small: Any, renumbered: Any) -> Any:
    """Return ``small`` with the chat template, names and stop tokens of ``tokenizer``."""
    return small.with_settings(
        stop_ids=[renumbered(id_) for id_ in tokenizer.own_stop_ids],
        chat_template=tokenizer.chat_template,
        tool_template=tokenizer.tool_template,
        token_names=tokenizer.token_names,
        where=f"{tokenizer.where}, trimmed",
    )


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


def _too_small(size: int, least: int) -> TokenizerError:
    return TokenizerError(
        f"a vocabulary of {size:,} has no room for merges: its special tokens and bytes alone are {least:,}"
    )
