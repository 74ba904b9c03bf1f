"""Write a tokenizer as GGUF metadata, and read one.

llama.cpp calls byte-level BPE ``gpt2`` and Llama 3's regular expression ``llama-bpe``. Tokens are listed by
id, spelled as in `tokenizer.json`, with types that say which are special. A model may have more rows than the
tokenizer has ids: the rest are written as unused ``[PAD…]`` tokens, which are left out when a file is read.

Source: llama.cpp ``convert_hf_to_gguf.py`` (``_set_vocab_gpt2``), ``llama-vocab.cpp``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, TokenizerError
from ..text import CHAT_TEMPLATE, Tokenizer
from ..text.pretokenizers import is_llama3
from ..text.ranks import Ranks, unspell
from ..text.ranks_tokenizer import NEEDED_SPECIAL, RanksTokenizer
from ..text.tokenizer_json import merges_agree
from ..text.vocabulary import CONTROL, NORMAL, UNUSED, Vocabulary
from .gguf import GGUF, Strings

LLAMA3_PRE = "llama-bpe"
STOP_IDS = "herd.stop_token_ids"
TEMPLATE, TOOL_TEMPLATE = "tokenizer.chat_template", "tokenizer.chat_template.tool_use"
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece"}


def has_tokenizer(file: GGUF) -> bool:
    """Return whether the file has a tokenizer."""
    return file.get("tokenizer.ggml.model", str, "none") not in ("none", "no_vocab")


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (key, type, value) of ``tokenizer.*`` for ``vocab_size`` rows. See `gguf_write.Value`."""
    vocabulary = tokenizer.vocabulary
    unused = [f"[PAD{id_}]" for id_ in range(len(vocabulary.tokens), vocab_size)]
    byte_level = vocabulary.scores is None
    yield "tokenizer.ggml.model", "STRING", "gpt2" if byte_level else "llama"
    yield "tokenizer.ggml.pre", "STRING", vocabulary.pre if byte_level else "default"
    yield "tokenizer.ggml.tokens", "[STRING", vocabulary.tokens + unused
    yield "tokenizer.ggml.token_type", "[INT32", [*vocabulary.types, *[UNUSED] * len(unused)]
    if byte_level:
        yield "tokenizer.ggml.merges", "[STRING", list(vocabulary.merges or ())
    else:
        yield "tokenizer.ggml.scores", "[FLOAT32", [*(vocabulary.scores or ()), *[0.0] * len(unused)]
        yield "tokenizer.ggml.add_space_prefix", "BOOL", vocabulary.add_space_prefix
    ids, others = _ids_by_role(tokenizer)
    for role, id_ in ids.items():
        if id_ is not None:
            yield f"tokenizer.ggml.{role}_token_id", "UINT32", id_
    if others:
        yield STOP_IDS, "[INT32", others
    yield "tokenizer.ggml.add_bos_token", "BOOL", tokenizer.add_bos
    template = tokenizer.chat_template
    if template is None and isinstance(tokenizer, RanksTokenizer):
        template = CHAT_TEMPLATE
    if template is not None:
        yield TEMPLATE, "STRING", template
    if tokenizer.tool_template is not None:
        yield TOOL_TEMPLATE, "STRING", tokenizer.tool_template


def _ids_by_role(tokenizer: Tokenizer) -> tuple[dict[str, int | None], list[int]]:
    """Return the ids of special tokens by GGUF's names, and the stop tokens that GGUF has no place for."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids["unknown"] = tokenizer.unk_id
    if isinstance(tokenizer, RanksTokenizer):
        ids |= {"eot": tokenizer.eot_id, "eom": tokenizer.eom_id}
    others = sorted(tokenizer.stop_ids - {ids.get(role) for role in ("eos", "eot", "eom")})
    for role in ("eos", "eot"):
        # the checkpoint's own stop token comes first, because Llama 3's is known anyway
        if others and (ids.get(role) is None or (role == "eos" and "eom" in ids)):
            ids[role] = others.pop(0)
    return ids, others


def read_tokenizer(file: GGUF, *, pre: str | None = None, compare_merges: bool = False) -> Tokenizer:
    """Return the file's tokenizer, with its own stop tokens and chat template.

    ``pre`` names the pre-tokenizer if the file names none, or one that is not known. A vocabulary like
    Llama 3's becomes ranks. ``compare_merges`` checks that the file's merges agree with them (this takes
    seconds for Meta's vocabulary). Raises `TokenizerError` if the tokenizer is missing or malformed.
    """
    try:
        vocabulary = _vocabulary(file, pre)
        tokenizer = _with_ranks(vocabulary, compare_merges) or _with_library(vocabulary, file)
    except TokenizerError as error:
        raise TokenizerError(f"{file.path}: {error}") from error
    stop_ids = set(file.get(STOP_IDS, tuple, ()))
    names: dict[str, str] = {}
    for role in ("bos", "eos", "eot", "eom"):
        id_ = file.get(f"tokenizer.ggml.{role}_token_id", int)
        if id_ is None:
            continue
        if not 0 <= id_ < tokenizer.vocab_size:
            raise TokenizerError(f"{file.path}: {role}_token_id={id_} is outside its vocabulary")
        if role in ("bos", "eos"):
            names[f"{role}_token"] = tokenizer.token_bytes(id_).decode("utf-8", "replace")
        stop_ids |= set() if role == "bos" else {id_}
    return tokenizer.with_settings(
        stop_ids=stop_ids,
        chat_template=file.get(TEMPLATE, str),
        tool_template=file.get(TOOL_TEMPLATE, str),
        token_names=names,
        where=str(file.path),
    )


def _vocabulary(file: GGUF, pre: str | None) -> Vocabulary:
    kind = file.get("tokenizer.ggml.model", str, "none")
    if kind not in _KINDS:
        known = ", ".join(f"{name!r} ({what})" for name, what in _KINDS.items())
        raise TokenizerError(f"its tokenizer is of the kind {kind!r}; read are {known}")
    words = _texts(file, "tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type", tuple) or (NORMAL,) * len(words)
    unused = len(words)
    while unused and types[unused - 1 : unused] == (UNUSED,):
        unused -= 1
    vocabulary = Vocabulary(words[:unused], types[:unused] if len(types) == len(words) else types)
    if kind == "llama":
        scores = file.require("tokenizer.ggml.scores", tuple)
        adds_space = file.get("tokenizer.ggml.add_space_prefix", bool, True)
        return replace(vocabulary, scores=scores[:unused], add_space_prefix=adds_space)
    pre = pre or file.get("tokenizer.ggml.pre", str)
    if pre is None:
        pre = LLAMA3_PRE if vocabulary.ids.keys() >= set(NEEDED_SPECIAL) else "default"
        warnings.warn(f"{file.path}: does not name its pre-tokenizer; using {pre!r} (--pre)", stacklevel=4)
    return replace(vocabulary, merges=_texts(file, "tokenizer.ggml.merges"), pre=pre)


def _with_ranks(vocabulary: Vocabulary, compare_merges: bool) -> RanksTokenizer | None:
    """Return a tokenizer of ranks for a vocabulary of Llama 3's kind, else None."""
    if not (is_llama3(vocabulary.pre) and vocabulary.ids.keys() >= set(NEEDED_SPECIAL)):
        return None
    special = {word: vocabulary.ids[word] for word in vocabulary.of_type(CONTROL)}
    try:
        ranks: Ranks = {unspell(word): vocabulary.ids[word] for word in vocabulary.of_type(NORMAL)}
        tokenizer = RanksTokenizer(ranks, special)
    except (KeyError, TokenizerError):
        return None
    if compare_merges and not merges_agree(vocabulary.merges or (), ranks, ignore_merges=True):
        return None
    return tokenizer


def _with_library(vocabulary: Vocabulary, file: GGUF) -> Tokenizer:
    from ..text.library_tokenizer import LibraryTokenizer  # importing tokenizers takes 20 ms

    ids = {role: file.get(f"tokenizer.ggml.{key}_token_id", int) for role, key in _ROLES.items()}
    roles = {
        role: vocabulary.tokens[id_] if id_ is not None and 0 <= id_ < len(vocabulary.tokens) else None
        for role, id_ in ids.items()
    }
    add_bos = file.get(
        "tokenizer.ggml.add_bos_token", bool, vocabulary.scores is not None or is_llama3(vocabulary.pre)
    )
    return LibraryTokenizer(vocabulary.build(), **roles, add_bos=add_bos, vocabulary=vocabulary)


def _texts(file: GGUF, key: str) -> list[str]:
    found = file.require(key, Strings)
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file.path}: corrupt: {key} is not UTF-8; fetch the file again") from error
