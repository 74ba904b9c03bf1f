"""Write a tokenizer as GGUF metadata, and read one.

llama.cpp calls byte-level BPE ``gpt2`` and Llama 3's regular expression ``llama-bpe``. Tokens are listed by
id, spelled as in `tokenizer.json`, with types that say which are special. A model may have more rows than the
tokenizer has ids: the rest are written as unused ``[PAD…]`` tokens, which are left out when a file is read.

Source: llama.cpp ``convert_hf_to_gguf.py`` (``_set_vocab_gpt2``), ``llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import CheckpointError, TokenizerError
from ..text.ranks import Ranks, merges, spell, unspell
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_json import CHAT_TEMPLATE, check_merges
from .chat_format import with_template
from .gguf import GGUF, Strings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PRE = "llama-bpe"
STOP_IDS = "herd.stop_token_ids"
_SAME_PRE = (PRE, "llama3", "llama-v3")
"""llama.cpp's names of the same regular expression."""


def has_tokenizer(file: GGUF) -> bool:
    """Return whether the file has a tokenizer."""
    return file.get("tokenizer.ggml.model", str, "none") not in ("none", "no_vocab")


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (key, type, value) of ``tokenizer.*`` for a model with ``vocab_size`` rows; see
    `gguf_write.Value`."""
    words = [spell(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.n_ranks)]
    special = [tokenizer.token_bytes(id_).decode() for id_ in range(tokenizer.n_ranks, tokenizer.vocab_size)]
    unused = [f"[PAD{id_}]" for id_ in range(tokenizer.vocab_size, vocab_size)]
    types = [NORMAL] * len(words) + [CONTROL] * len(special) + [UNUSED] * len(unused)
    pairs = [f"{spell(left)} {spell(right)}" for left, right in merges(tokenizer.ranks)]
    yield "tokenizer.ggml.model", "STRING", "gpt2"
    yield "tokenizer.ggml.pre", "STRING", PRE
    yield "tokenizer.ggml.tokens", "[STRING", words + special + unused
    yield "tokenizer.ggml.token_type", "[INT32", types
    yield "tokenizer.ggml.merges", "[STRING", pairs
    yield "tokenizer.ggml.bos_token_id", "UINT32", tokenizer.bos_id
    extra = sorted(tokenizer.stop_ids - {tokenizer.eos_id, tokenizer.eot_id, tokenizer.eom_id})
    yield "tokenizer.ggml.eos_token_id", "UINT32", (extra or [tokenizer.eos_id])[0]
    if len(extra) > 1:  # GGUF has a place for one
        yield STOP_IDS, "[INT32", extra
    yield "tokenizer.ggml.eot_token_id", "UINT32", tokenizer.eot_id
    yield "tokenizer.ggml.eom_token_id", "UINT32", tokenizer.eom_id
    yield "tokenizer.ggml.padding_token_id", "UINT32", tokenizer.pad_id
    yield "tokenizer.ggml.add_bos_token", "BOOL", True
    yield "tokenizer.chat_template", "STRING", tokenizer.chat_template or CHAT_TEMPLATE


def read_tokenizer(file: GGUF) -> Tokenizer:
    """Return the file's tokenizer, with its own stop tokens and chat format (see `chat_format`).

    Merges are not compared with the vocabulary here; `check_tokenizer` does that. Raises `TokenizerError`
    when the tokenizer is missing, malformed or not one of Llama 3's kind.
    """
    kind = file.get("tokenizer.ggml.model", str, "none")
    if kind != "gpt2":
        raise TokenizerError(
            f"{file.path}: its tokenizer is {kind!r}; only Llama 3's byte-level BPE ('gpt2') is read"
        )
    pre = file.get("tokenizer.ggml.pre", str, "")
    if pre not in _SAME_PRE:
        raise TokenizerError(f"{file.path}: its pre-tokenizer is {pre!r}, not Llama 3's ({PRE!r})")
    words, types = _texts(file, "tokenizer.ggml.tokens"), file.require("tokenizer.ggml.token_type", tuple)
    if len(types) != len(words):
        raise TokenizerError(
            f"{file.path}: {len(words)} tokens, but {len(types)} token types; fetch the file again"
        )
    ranks: Ranks = {}
    special: dict[str, int] = {}
    unused = len(words)
    while unused and types[unused - 1] == UNUSED:
        unused -= 1
    try:
        for id_ in range(unused):
            if types[id_] == NORMAL:
                ranks[unspell(words[id_])] = id_
            else:
                special[words[id_]] = id_
        if len(ranks) + len(special) < unused:
            raise TokenizerError("a token is there twice")
        tokenizer = Tokenizer(ranks, special)
    except KeyError as error:
        raise TokenizerError(
            f"{file.path}: {error.args[0]!r} in a token stands for no byte; not Llama 3's"
        ) from error
    except (TokenizerError, ValueError) as error:
        raise TokenizerError(f"{file.path}: {error}") from error
    bos = file.get("tokenizer.ggml.bos_token_id", int, tokenizer.bos_id)
    if bos != tokenizer.bos_id:
        raise TokenizerError(
            f"{file.path}: bos_token_id={bos}, but a Llama 3 vocabulary of this size has {tokenizer.bos_id}"
        )
    stop_ids = set(file.get(STOP_IDS, tuple, ()))
    for role in ("eos", "eot", "eom"):
        id_ = file.get(f"tokenizer.ggml.{role}_token_id", int)
        if id_ is not None and not 0 <= id_ < tokenizer.vocab_size:
            raise TokenizerError(f"{file.path}: {role}_token_id={id_} is outside its vocabulary")
        stop_ids |= set() if id_ is None else {id_}
    eos = tokenizer.token_bytes(file.get("tokenizer.ggml.eos_token_id", int, tokenizer.eos_id))
    names = {"bos_token": words[bos], "eos_token": eos.decode("utf-8", "replace")}
    template = file.get("tokenizer.chat_template", str)
    return with_template(tokenizer, template, stop_ids, names, file.path)


def check_tokenizer(file: GGUF, tokenizer: Tokenizer) -> None:
    """Raise `TokenizerError` unless the file's merges agree with its vocabulary. Takes seconds for Meta's."""
    model = {"merges": _texts(file, "tokenizer.ggml.merges"), "ignore_merges": True}
    check_merges(file.path, model, tokenizer.ranks)


def _texts(file: GGUF, key: str) -> list[str]:
    found = file.require(key, Strings)
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file.path}: corrupt: {key} is not UTF-8; fetch the file again") from error
