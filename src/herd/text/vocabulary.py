"""Build a tokenizer of the `tokenizers` library from a vocabulary that is not a `tokenizer.json`.

Two kinds of vocabulary are known. *Byte-level BPE* (GGUF's "gpt2"): tokens are spelled in GPT-2's printable
characters, merges are listed, and a regular expression cuts the text first. *SentencePiece* (GGUF's "llama",
and the file ``tokenizer.model`` of Llama 1 and 2, TinyLlama, Mistral): tokens have scores, spaces are written
"▁", and characters outside the vocabulary become byte tokens ``<0x0A>``. SentencePiece joins the pair with
the best score first, which is BPE with merges in the order of their scores.

Sources: llama.cpp ``llama-vocab.cpp``; transformers ``convert_slow_tokenizer.py``;
``sentencepiece_model.proto``.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of a token, with the same numbers in GGUF and in SentencePiece's file."""
SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PROBE = (
    "Hello World's 12345 don'T CAFÉ naïve\r\n\r\n  \t x_y (a+b)=c; `q` ~|^ $5.00 «ж»ӠǅǆDŽ "
    "日本語テキスト，。한국어 ไทย हिन्दी \u0301e\u0301 ½² Ⅳ ٣٤٥٦ 🦙👩‍👩‍👧 ...!!!?? "
    "/path/to\n\n\n end  \n 1.5e-3 'S i'Ll x  "
)
"""A text with whatever pre-tokenizers treat differently."""


@dataclass
class Vocabulary:
    """The tokens of a model by id, with what their kind needs: ``merges`` and ``pre``, or ``scores``."""

    tokens: list[str]
    types: Sequence[int]
    merges: Sequence[str] | None = None
    pre: str = ""
    scores: Sequence[float] | None = None
    add_space_prefix: bool = True
    ids: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.types) != len(self.tokens):
            raise TokenizerError(f"{len(self.tokens)} tokens, but {len(self.types)} token types")
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for id_, token in enumerate(self.tokens) if self.ids[token] != id_)
            raise TokenizerError(f"the token {twice!r} is in the vocabulary twice")

    def of_type(self, *types: int) -> list[str]:
        """Return the tokens of these types, in the order of their ids."""
        return [token for token, type_ in zip(self.tokens, self.types, strict=True) if type_ in types]

    def build(self) -> Tokenizer:
        """Return it as a `tokenizers.Tokenizer`. Raises `TokenizerError` if it contradicts itself."""
        tokenizer = self._byte_level() if self.scores is None else self._sentencepiece()
        from tokenizers import AddedToken

        special = self.of_type(CONTROL, UNKNOWN)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        defined = self.of_type(USER_DEFINED)
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
        return tokenizer

    def _byte_level(self) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models

        known = PRE_TOKENIZERS.get(self.pre)
        if known is None:
            raise TokenizerError(
                f"its pre-tokenizer is {self.pre!r}, which is not known; name "
                f"one that fits (--pre of herd chat and herd import): {', '.join(sorted(PRE_TOKENIZERS))}"
            )
        merges = []
        for merge in self.merges or ():
            left, _, right = merge.partition(" ")
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise TokenizerError(f"the merge {merge!r} needs a token that the vocabulary lacks")
            merges.append((left, right))
        tokenizer = Tokenizer(models.BPE(self.ids, merges, ignore_merges=known.ignore_merges))
        tokenizer.pre_tokenizer = known.cutter()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, normalizers

        unknown = next(iter(self.of_type(UNKNOWN)), None)
        model = models.BPE(
            self.ids, self._merges_by_score(), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
        tokenizer = Tokenizer(model)
        steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
        if self.add_space_prefix:
            steps.insert(0, normalizers.Prepend(SPACE))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tail = [decoders.Strip(" ", 1, 0)] if self.add_space_prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
        )
        return tokenizer

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Return every pair of tokens that joins to a token: best score first, then lower ids."""
        scores = self.scores or ()
        ranked = []
        for id_, token in enumerate(self.tokens):
            if self.types[id_] in (UNKNOWN, CONTROL, BYTE):
                continue
            for cut in range(1, len(token)):
                left, right = self.ids.get(token[:cut]), self.ids.get(token[cut:])
                if left is not None and right is not None:
                    ranked.append((-scores[id_], id_, left, right, cut))
        ranked.sort()
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right, _ in ranked]


def vocabulary_of(library: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a library's tokenizer as GGUF files store it.

    Raises `TokenizerError` if the model is not BPE, or if GGUF has no name for its way of splitting text.
    """
    content = json.loads(library.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"its model is {model['type']}; GGUF files of Llamas hold BPE only")
    added = {token["id"]: token for token in content["added_tokens"]}
    n_tokens = 1 + max([*model["vocab"].values(), *added])
    tokens = [f"[PAD{id_}]" for id_ in range(n_tokens)]
    types = [UNUSED] * n_tokens
    for token, id_ in model["vocab"].items():
        tokens[id_] = token
        types[id_] = BYTE if model["byte_fallback"] and _BYTE.fullmatch(token) else NORMAL
    for id_, token in added.items():
        tokens[id_], types[id_] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not model["byte_fallback"]:
        return Vocabulary(tokens, types, merges=merges, pre=_name_of_pre_tokenizer(library, model))
    # SentencePiece joins the pair of the best score: the earlier a merge makes a token, the better its score.
    scores = [-1e6] * n_tokens
    ids = {token: id_ for id_, token in enumerate(tokens)}
    for number, merge in enumerate(merges):
        joined = ids.get(merge.replace(" ", "", 1), 0)
        scores[joined] = max(scores[joined], -float(number))
    adds_space = library.encode("x", add_special_tokens=False).tokens[0].startswith(SPACE)
    return Vocabulary(tokens, types, scores=scores, add_space_prefix=adds_space)


def _name_of_pre_tokenizer(library: Tokenizer, model: dict[str, Any]) -> str:
    """Return GGUF's name for the way in which the library's tokenizer splits text, found by trying."""
    cut = library.pre_tokenizer.pre_tokenize_str if library.pre_tokenizer else None
    if cut is not None and library.normalizer is None:
        pieces = cut(_PROBE)
        same = [
            name
            for name, known in PRE_TOKENIZERS.items()
            if known.cutter().pre_tokenize_str(_PROBE) == pieces
        ]
        exact = [n for n in same if PRE_TOKENIZERS[n].ignore_merges == bool(model.get("ignore_merges"))]
        if exact:
            return exact[0]
    raise TokenizerError("GGUF has no name for its way of splitting text; export it with --format hf")


def read_sentencepiece(data: bytes) -> Vocabulary:
    """Return the vocabulary in a SentencePiece model file (``tokenizer.model`` of Llama 1 and 2).

    Raises `TokenizerError` for a file that is not a SentencePiece model, or is not BPE.
    """
    tokens, scores, types = [], [], []
    algorithm, add_space_prefix = 1, True
    try:
        for number, value in _messages(data):
            if number == 1:  # pieces
                piece = dict(_messages(value))
                tokens.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, NORMAL))
            elif number == 2:  # trainer_spec.model_type: 1 unigram, 2 bpe
                algorithm = dict(_messages(value)).get(3, 1)
            elif number == 3:  # normalizer_spec.add_dummy_prefix
                add_space_prefix = bool(dict(_messages(value)).get(3, 1))
    except (IndexError, KeyError, AttributeError, TypeError, ValueError, struct.error) as error:
        raise TokenizerError(f"not a SentencePiece model ({type(error).__name__})") from error
    if not tokens:
        raise TokenizerError("not a SentencePiece model: it has no pieces")
    if algorithm != 2:
        raise TokenizerError("its SentencePiece algorithm is not BPE, which is the one of the Llama family")
    return Vocabulary(tokens, types, scores=scores, add_space_prefix=add_space_prefix)


def _messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the (field number, value) pairs of a protobuf message: varints as integers, others as bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a varint has more than 64 bits")

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) if kind != 2 else varint()
        if size is None or place + size > len(data):
            raise ValueError("a field is cut off or of an unknown kind")
        yield key >> 3, data[place : place + size]
        place += size
