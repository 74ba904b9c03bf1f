"""`tokenizer.json`, the file of Hugging Face's `tokenizers`: written from ranks, and read back into ranks.

The written file has the regular expression as a `Split` pre-tokenizer, the bytes spelled in GPT-2's printable
characters, one merge per token (`ranks.merges`), ``ignore_merges``, so that a piece which is a token is taken
whole as in tiktoken, and a post-processor that puts ``<|begin_of_text|>`` first, as in Meta's release on
Hugging Face.

Only files that mean the same as some ranks are read into ranks. All others are `LibraryTokenizer`s.

One difference remains: `tokenizers` turns special tokens that are spelled in a text into their ids, and our
tokenizer never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .pretokenizers import PreTokenizer
from .ranks import Ranks, check_ranks, merges, spell, unspell

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's regular expression, which cuts text into the pieces that are byte-pair encoded."""

TRAINING_PATTERN = PATTERN.replace(r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?\p{L}+").replace(r"\p{N}{1,3}", r"\p{N}")
"""The pieces that merges are learned in: no merge joins two digits, or a word and a sign before it.

So numbers are sequences of digits, and a word has the same tokens behind a quote, a bracket and a line break.
A small model need not learn every number and every quoted word as one of its own before it can copy them.
"""


CHAT_TEMPLATE = files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")
"""`ChatFormat.render` as a Jinja template for other programs.

Its variables are ``messages``, ``tools`` (schemas), ``builtin_tools`` (names), ``tool_call_format``,
``date_string`` and ``add_generation_prompt``. It gives the same ids as `ChatFormat.render` except where Jinja
cannot: a content that begins with a line break is merged with the header's line breaks, a content that spells
a special token becomes that token, and arguments that are given as a string are not reformatted.
"""


def train_ranks(texts: Iterable[str], n_ranks: int) -> Ranks:
    """Train BPE on the pieces of `TRAINING_PATTERN`. Returns fewer ranks if the texts run out of pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = PreTokenizer((TRAINING_PATTERN,)).cutter()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    ranks = {unspell(spelling): rank for spelling, rank in trained.get_vocab().items()}
    check_ranks(ranks, "trained vocabulary")
    return ranks


def tokenizer_json(ranks: Ranks, special_tokens: dict[str, int], bos_id: int) -> str:
    """Return the content of `tokenizer.json`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    names = sorted(special_tokens, key=special_tokens.__getitem__)
    bos = names[bos_id - len(ranks)]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    pairs = [(spell(left), spell(right)) for left, right in merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = PreTokenizer((PATTERN,)).cutter()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
            ),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer.to_str()


def read_tokenizer_json(path: Path, *, compare_merges: bool = True) -> tuple[Ranks, dict[str, int]] | None:
    """Read the ranks and special tokens of a `tokenizer.json`, or None if no ranks behave as it does.

    ``compare_merges`` False leaves out the slow part of that, for a folder whose `tokenizer.model` has the
    ranks as well. Raises `TokenizerError` for a file that is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: a tokenizer.json is one JSON object, not {type(content).__name__}")
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or content.get("normalizer"):
        return None
    try:
        if PATTERN not in _patterns(content.get("pre_tokenizer")):
            return None
        added = content.get("added_tokens", [])
        special_tokens = {str(t["content"]): int(t["id"]) for t in added}
        if not all(t.get("special") for t in added):
            return None  # a text may become one of these
        words = {word: int(id_) for word, id_ in model["vocab"].items() if special_tokens.get(word) != id_}
        ranks = {unspell(word): id_ for word, id_ in words.items()}
        check_ranks(ranks, str(path))
        ignored = bool(model.get("ignore_merges"))
        if compare_merges and not merges_agree(model["merges"], ranks, ignore_merges=ignored):
            return None
    except (AttributeError, KeyError, TypeError, ValueError, TokenizerError):
        return None
    return ranks, special_tokens


def _patterns(pre_tokenizer: Any) -> list[str]:
    """Return all regular expressions of a pre-tokenizer."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [pattern for part in pre_tokenizer.get("pretokenizers", []) for pattern in _patterns(part)]
    pattern = pre_tokenizer.get("pattern")
    return [str(pattern["Regex"])] if isinstance(pattern, dict) and "Regex" in pattern else []


def merges_agree(listed: Sequence[Any], ranks: Ranks, *, ignore_merges: bool) -> bool:
    """Return whether a list of merges means the same as the ranks."""
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in listed]
        found = [(unspell(left), unspell(right)) for left, right in pairs]
        order = [ranks[left + right] for left, right in found]
    except (KeyError, TypeError, ValueError):
        return False  # malformed, or merges of words outside the vocabulary
    wanted = merges(ranks)
    n_unreachable = len(ranks) - sum(len(token) == 1 for token in ranks) - len(wanted)
    return order == sorted(order) and set(wanted) <= set(found) and (ignore_merges or n_unreachable == 0)
