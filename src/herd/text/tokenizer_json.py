"""`tokenizer.json`: the same tokenizer in the form Hugging Face's `tokenizers` reads, derived from the ranks and back.

Written: the regex as a `Split` pre-tokenizer, the bytes spelled in GPT-2's printable characters, one merge per token
(`ranks.merges`), ``ignore_merges`` so that a piece which is a token is taken whole as tiktoken does, and the
post-processor that puts ``<|begin_of_text|>`` first, as in Meta's release on Hugging Face. Read: only files that mean
the same as some ranks, and this is checked, not hoped: another regex, a normalizer, or merges that disagree with the
order of the vocabulary are refused.

One thing cannot be carried over: `tokenizers` turns special tokens spelled in a text into their ids, ours never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .ranks import Ranks, check_ranks, merges, spell, unspell

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_ranks(texts: Iterable[str], n_ranks: int) -> Ranks:
    """Ranks learnt by `tokenizers`' BPE trainer; fewer than ``n_ranks`` if the texts run out of pairs."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    ranks = {unspell(spelling): rank for spelling, rank in trained.get_vocab().items()}
    check_ranks(ranks, "trained vocabulary")
    return ranks


def document(ranks: Ranks, special_tokens: Mapping[str, int], bos_id: int) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    bos = next(name for name, id_ in special_tokens.items() if id_ == bos_id)
    begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    begin_b, text_b = {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, begin_b, text_b],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, **_added(name)} for name, id_ in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [byte_level | {"trim_offsets": False}, template],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell(token): rank for token, rank in in_order},
            "merges": [f"{spell(left)} {spell(right)}" for left, right in merges(ranks)],
        },
    }


def config(
    special_tokens: Mapping[str, int], named: Mapping[str, str], chat_template: str, model_max_length: int
) -> dict[str, Any]:
    """The content of `tokenizer_config.json`. ``named``: bos_token, eos_token, pad_token."""
    return {
        "added_tokens_decoder": {str(id_): _added(name) for name, id_ in special_tokens.items()},
        **named,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _added(name: str) -> dict[str, Any]:
    return {
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def read(path: Path) -> tuple[Ranks, dict[str, int]]:
    """Ranks and special tokens of a `tokenizer.json` whose merges mean the same as its ranks.

    Raises `TokenizerError` if the file is malformed or no ranks could behave as it does.
    """
    content = _load(path)
    ranks, special_tokens = _vocabulary(path, content)
    check_merges(path, content["model"], ranks)
    return ranks, special_tokens


def read_vocabulary(path: Path) -> tuple[Ranks, dict[str, int]]:
    """`read` without the slower comparison of merges, for use beside a `tokenizer.model`."""
    return _vocabulary(path, _load(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: a tokenizer.json is one JSON object, not {type(content).__name__}")
    return content


def _vocabulary(path: Path, content: dict[str, Any]) -> tuple[Ranks, dict[str, int]]:
    model = content.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        raise TokenizerError(f"{path}: its model is not byte-level BPE; only Llama 3 tokenizers are read")
    if content.get("normalizer") is not None:
        raise TokenizerError(
            f"{path}: has a normalizer, so text would not come back exactly; Llama 3 has none"
        )
    if PATTERN not in _patterns(content.get("pre_tokenizer")):
        raise TokenizerError(f"{path}: its pre-tokenizer is not Llama 3's regular expression")
    try:
        special_tokens = {
            str(token["content"]): int(token["id"]) for token in content.get("added_tokens", [])
        }
        words = {word: int(id_) for word, id_ in model["vocab"].items() if special_tokens.get(word) != id_}
        ranks = {unspell(word): id_ for word, id_ in words.items()}
    except KeyError as error:
        raise TokenizerError(
            f"{path}: {error.args[0]!r} is no byte-level character or key; not Llama 3's"
        ) from error
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: malformed vocabulary or added_tokens ({error})") from error
    check_ranks(ranks, str(path))
    return ranks, special_tokens


def _patterns(pre_tokenizer: Any) -> list[str]:
    """All regular expressions of a pre-tokenizer."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [pattern for part in pre_tokenizer.get("pretokenizers", []) for pattern in _patterns(part)]
    pattern = pre_tokenizer.get("pattern")
    return [str(pattern["Regex"])] if isinstance(pattern, dict) and "Regex" in pattern else []


def check_merges(path: Path, model: dict[str, Any], ranks: Ranks) -> None:
    try:
        pairs = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        ]
        listed = [(unspell(left), unspell(right)) for left, right in pairs]
        order = [ranks[left + right] for left, right in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path}: malformed merges, or of words outside the vocabulary ({error})"
        ) from error
    wanted = merges(ranks)
    reached = sum(len(token) == 1 for token in ranks) + len(wanted)
    if order != sorted(order):
        reason = "its merges are not in the order of its vocabulary"
    elif not set(wanted) <= set(listed):
        reason = "it lacks merges that its vocabulary implies"
    elif reached < len(ranks) and not model.get("ignore_merges"):
        reason = f"{len(ranks) - reached} words cannot be merged and ignore_merges is off"
    else:
        return
    raise TokenizerError(f"{path}: {reason}, so no ranks behave as it does; convert it with its own library")
