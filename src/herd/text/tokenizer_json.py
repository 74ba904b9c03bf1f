"""`tokenizer.json`, the file of Hugging Face's `tokenizers`: written from ranks, and read back into ranks.

The written file has the regular expression as a `Split` pre-tokenizer, the bytes spelled in GPT-2's printable
characters, one merge per token (`ranks.merges`), ``ignore_merges``, so that a piece which is a token is taken
whole as in tiktoken, and a post-processor that puts ``<|begin_of_text|>`` first, as in Meta's release on
Hugging Face.

Only files that mean the same as some ranks are read: another regular expression, a normalizer, or merges that
disagree with the order of the vocabulary are refused.

One difference remains: `tokenizers` turns special tokens that are spelled in a text into their ids, and our
tokenizer never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .ranks import Ranks, check_ranks, merges, spell, unspell

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's regular expression, which cuts text into the pieces that are byte-pair encoded."""


CHAT_TEMPLATE = files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")
"""`chat.render` as a Jinja template for other programs.

Its variables are ``messages``, ``tools`` (schemas), ``builtin_tools`` (names), ``tool_call_format``,
``date_string`` and ``add_generation_prompt``. It gives the same ids as `chat.render` except where Jinja
cannot: a content that begins with a line break is merged with the header's line breaks, a content that spells
a special token becomes that token, and arguments that are given as a string are not reformatted.
"""


def train_ranks(texts: Iterable[str], n_ranks: int) -> Ranks:
    """Train BPE with `tokenizers`. Returns fewer than ``n_ranks`` if the texts run out of pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    ranks = {unspell(spelling): rank for spelling, rank in trained.get_vocab().items()}
    check_ranks(ranks, "trained vocabulary")
    return ranks


def tokenizer_json(ranks: Ranks, special_tokens: Mapping[str, int], bos_id: int) -> str:
    """Return the content of `tokenizer.json`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    names = sorted(special_tokens, key=special_tokens.__getitem__)
    bos = names[bos_id - len(ranks)]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    pairs = [(spell(left), spell(right)) for left, right in merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
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


def _pre_tokenizer() -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_config(
    special_tokens: Mapping[str, int], roles: Mapping[str, str], template: str, model_max_length: int
) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`. ``roles`` names bos_token, eos_token and pad_token."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "added_tokens_decoder": {
            str(id_): {"content": name, **flags} for name, id_ in special_tokens.items()
        },
        **roles,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def read_tokenizer_json(path: Path, *, compare_merges: bool = True) -> tuple[Ranks, dict[str, int]]:
    """Read the ranks and special tokens of a `tokenizer.json`.

    Raises `TokenizerError` if the file is malformed or no ranks could behave as it does. ``compare_merges``
    False leaves out the slow part of that, for a folder whose `tokenizer.model` has the ranks as well.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: a tokenizer.json is one JSON object, not {type(content).__name__}")
    model = content["model"] if isinstance(content.get("model"), dict) else {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{path}: its model is not byte-level BPE; only Llama 3 tokenizers are read")
    if content.get("normalizer") is not None:
        raise TokenizerError(
            f"{path}: has a normalizer, so text would not come back exactly; Llama 3 has none"
        )
    if PATTERN not in _patterns(content.get("pre_tokenizer")):
        raise TokenizerError(f"{path}: its pre-tokenizer is not Llama 3's regular expression")
    try:
        special_tokens = {str(t["content"]): int(t["id"]) for t in content.get("added_tokens", [])}
        words = {word: int(id_) for word, id_ in model["vocab"].items() if special_tokens.get(word) != id_}
        ranks = {unspell(word): id_ for word, id_ in words.items()}
    except KeyError as error:
        raise TokenizerError(
            f"{path}: {error.args[0]!r} is not a byte-level character or key; not Llama 3's"
        ) from error
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: malformed vocabulary or added_tokens ({error})") from error
    check_ranks(ranks, str(path))
    if compare_merges:
        check_merges(path, model, ranks)
    return ranks, special_tokens


def _patterns(pre_tokenizer: Any) -> list[str]:
    """Return all regular expressions of a pre-tokenizer."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [pattern for part in pre_tokenizer.get("pretokenizers", []) for pattern in _patterns(part)]
    pattern = pre_tokenizer.get("pattern")
    return [str(pattern["Regex"])] if isinstance(pattern, dict) and "Regex" in pattern else []


def check_merges(path: Path, model: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise `TokenizerError` unless the merges of a BPE ``model`` mean the same as the ranks."""
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        listed = [(unspell(left), unspell(right)) for left, right in pairs]
        order = [ranks[left + right] for left, right in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path}: malformed merges, or merges of words outside the vocabulary ({error})"
        ) from error
    wanted = merges(ranks)
    n_unreachable = len(ranks) - sum(len(token) == 1 for token in ranks) - len(wanted)
    if order != sorted(order):
        reason = "its merges are not in the order of its vocabulary"
    elif not set(wanted) <= set(listed):
        reason = "it lacks merges that its vocabulary implies"
    elif n_unreachable and not model.get("ignore_merges"):
        reason = f"{n_unreachable} words cannot be merged and ignore_merges is off"
    else:
        return
    raise TokenizerError(f"{path}: {reason}, so no ranks behave as it does; convert it with its own library")
