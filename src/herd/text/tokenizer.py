"""The Llama 3 tokenizer: ranks in, ids out, and back without loss.

Text is cut into pieces by a regular expression (words with their leading space, up to three digits, punctuation,
newlines), each piece is byte-pair encoded by its ranks (`ranks.py`), and 256 special tokens follow after the ranks:
``<|begin_of_text|>`` is id ``n_ranks``, ``<|eot_id|>`` is ``n_ranks + 9``, names and order as released with Llama 3.1.
tiktoken does the work at run time; Hugging Face's `tokenizers` only trains.

Two promises hold for every text: it comes back exactly, and *text never becomes a special token*: someone who types
``<|eot_id|>`` gets its seven ordinary tokens. Special ids are only ever put in by code (`chat.py`).

Source: llama-models ``models/llama3/tokenizer.py`` (regex, special tokens, guards for long inputs).
"""

from __future__ import annotations

import codecs
import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken

from ..errors import ChatError, TokenizerError
from ..files import write_atomically
from . import tokenizer_json
from .ranks import Ranks, check_ranks, ranks_bytes, ranks_sha256, read_ranks

PATTERN = tokenizer_json.PATTERN
N_SPECIAL = 256
# Ids n_ranks + 0, 1, 2, ... of the 3.1 release. (3.2 renamed number 11 to <|image|>; ids matter, not names.)
# fmt: off
NAMED_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
)
# fmt: on
SPECIAL_TOKENS: tuple[str, ...] = tuple(
    f"<|{name}|>" for name in (*NAMED_SPECIAL, *(f"reserved_special_token_{i}" for i in range(2, 247)))
)

# tiktoken's regex engine fails on very long inputs and is quadratic in very long runs; these are Meta's limits. Cutting
# there can cost a token at a cut, never text.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


class Tokenizer:
    """A Llama 3 tokenizer. Make one with `from_file`, `from_folder` or `train`; it does not change afterwards."""

    def __init__(self, ranks: Ranks, special_tokens: Mapping[str, int] | None = None):
        """``ranks``: bytes to 0..n-1. ``special_tokens``: name to id, default the 3.1 release's 256 after the ranks."""
        check_ranks(ranks, "ranks")
        self.ranks = ranks
        self.n_ranks = len(ranks)
        default = {name: self.n_ranks + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.special_tokens: dict[str, int] = dict(default if special_tokens is None else special_tokens)
        self.vocab_size = self.n_ranks + len(self.special_tokens)
        if sorted(self.special_tokens.values()) != list(range(self.n_ranks, self.vocab_size)):
            raise TokenizerError(
                f"special tokens must have the ids after the {self.n_ranks} ranks, without gaps"
            )
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._special_names = {id_: name for name, id_ in self.special_tokens.items()}
        self.bos_id = self._special("begin_of_text")
        self.eos_id = self._special("end_of_text")
        self.pad_id = self._special("finetune_right_pad_id")
        self.start_header_id = self._special("start_header_id")
        self.end_header_id = self._special("end_header_id")
        self.eom_id = self._special("eom_id")
        self.eot_id = self._special("eot_id")
        self.python_tag_id = self._special("python_tag")
        self.stop_ids = frozenset({self.eos_id, self.eom_id, self.eot_id})
        self.chat_template: str | None = None  # a checkpoint's own, where it is not Llama 3.1's
        self.chat_problem: str | None = None  # why dialogs must not be written in Llama 3.1's format

    def _special(self, name: str) -> int:
        """Id of ``<|name|>``; a release that calls it otherwise (Llama 3: reserved) has it at the same place."""
        id_ = self.special_tokens.get(f"<|{name}|>", self.n_ranks + NAMED_SPECIAL.index(name))
        if id_ >= self.vocab_size:
            raise TokenizerError(f"special token <|{name}|> is missing: not a Llama 3 tokenizer")
        return id_

    # Making one

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From Meta's ranks file (``tokenizer.model``) or a ``tokenizer.json``; a folder is given to `from_folder`.

        Raises `TokenizerError` for a missing, malformed or non-Llama-3 file.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_folder(path)
        if path.suffix == ".json":
            return cls(*tokenizer_json.read(path))
        return cls(read_ranks(path))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """From a checkpoint folder: ``tokenizer.model`` or ``tokenizer.json``; where both are, they must agree."""
        folder = Path(folder)
        model, json_ = folder / "tokenizer.model", folder / "tokenizer.json"
        if not model.exists() and not json_.exists():
            raise TokenizerError(f"{folder}: holds neither tokenizer.model nor tokenizer.json")
        if not json_.exists():
            return cls.from_file(model)
        if not model.exists():
            return cls.from_file(json_)
        ranks = read_ranks(model)
        vocabulary, special_tokens = tokenizer_json.read_vocabulary(json_)
        if vocabulary != ranks:
            raise TokenizerError(
                f"{folder}: tokenizer.model and tokenizer.json disagree; remove the wrong one"
            )
        return cls(ranks, special_tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn byte-level BPE from texts with Llama 3's pre-tokenizer. ``vocab_size`` counts the 256 special tokens.

        Deterministic. The 256 bytes come first, then merges in the order learnt. Raises `TokenizerError` if
        ``vocab_size`` is below 512 or the texts do not hold enough distinct pairs for it.
        """
        n_ranks = vocab_size - N_SPECIAL
        if n_ranks < 256:
            raise TokenizerError(
                f"vocab_size={vocab_size} is below 512 = 256 bytes + {N_SPECIAL} special tokens"
            )
        ranks = tokenizer_json.train_ranks(map(check_text, texts), n_ranks)
        if len(ranks) < n_ranks:
            raise TokenizerError(
                f"vocab_size={vocab_size} is more than these texts can fill: use {len(ranks) + N_SPECIAL} or more text"
            )
        return cls(ranks)

    def with_settings(
        self, *, stop_ids: Iterable[int], chat_problem: str | None, chat_template: str | None
    ) -> Tokenizer:
        """Return a copy with more stop tokens and, for a checkpoint with another chat format, the reason against chat
        and the checkpoint's own template, which is saved again with it."""
        out = copy.copy(self)
        out.stop_ids = self.stop_ids | frozenset(stop_ids)
        out.chat_problem, out.chat_template = chat_problem, chat_template
        return out

    # Using it

    def require_chat_format(self) -> None:
        """Raise `ChatError` where dialogs must not be written in Llama 3.1's format."""
        if self.chat_problem is not None:
            raise ChatError(self.chat_problem)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``, with ``<|begin_of_text|>`` before and ``<|end_of_text|>`` after where asked.

        Special tokens spelled in ``text`` are ordinary text. Raises `TokenizerError` for a lone surrogate.
        """
        check_text(text)
        ids = [self.bos_id] if bos else []
        for piece in split_long(text):
            ids += self._encoding.encode_ordinary(piece)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = 2) -> list[list[int]]:
        """`encode` of many texts on several threads (tiktoken releases the interpreter's lock)."""
        pieces = [list(split_long(check_text(text))) for text in texts]
        flat = iter(
            self._encoding.encode_ordinary_batch([p for some in pieces for p in some], num_threads=n_threads)
        )
        return [[id_ for _ in some for id_ in next(flat)] for some in pieces]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Text of ids. Special tokens are spelled out, or left out with ``skip_special``. Ids that end within a
        character give U+FFFD with ``errors="replace"``, or raise `TokenizerError` with ``errors="strict"``."""
        try:
            return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"ids are not UTF-8 text ({error}); decode with errors='replace'") from error

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Bytes of ids; raises `TokenizerError` for an id outside the vocabulary."""
        return b"".join(
            [self.token_bytes(id_) for id_ in ids if not (skip_special and int(id_) in self._special_names)]
        )

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token; for a special token its spelling."""
        id = int(id)
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[id]

    @cached_property
    def _tokens(self) -> list[bytes]:
        in_order = sorted(self.ranks, key=self.ranks.__getitem__)
        return in_order + [self._special_names[id_].encode() for id_ in range(self.n_ranks, self.vocab_size)]

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the ranks in canonical form: the vocabulary's identity (Meta's: the sha256 of their file)."""
        return ranks_sha256(self.ranks)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tokenizer)
            and self.ranks == other.ranks
            and self.special_tokens == other.special_tokens
        )

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    # Keeping it

    def save(self, folder: str | os.PathLike[str], *, model_max_length: int = 131072) -> None:
        """Write ``tokenizer.model`` (ranks), ``tokenizer.json`` (derived, for Hugging Face and others),
        ``tokenizer_config.json`` with the chat template, and ``special_tokens_map.json``; each appears whole or not."""
        from .chat import CHAT_TEMPLATE

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        named = {role: self._special_names[id_] for role, id_ in roles.items()}
        template = self.chat_template or CHAT_TEMPLATE
        config = tokenizer_json.config(self.special_tokens, named, template, model_max_length)
        write_atomically(folder / "tokenizer.model", ranks_bytes(self.ranks))
        write_atomically(
            folder / "tokenizer.json",
            _json(tokenizer_json.document(self.ranks, self.special_tokens, self.bos_id)),
        )
        write_atomically(folder / "tokenizer_config.json", _json(config))
        write_atomically(folder / "special_tokens_map.json", _json(named))


class StreamDecoder:
    """Turns ids into text as they come: `feed` returns what is certain and holds back an unfinished character.

    The pieces together, with `finish`'s, are ``tokenizer.decode(all_ids, skip_special=...)``.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        """Text that becomes certain with these ids; may be empty."""
        some = [ids] if isinstance(ids, int) else ids
        return self._utf8.decode(self._tokenizer.decode_bytes(some, skip_special=self._skip_special))

    def finish(self) -> str:
        """What was held back: U+FFFD if the ids end within a character, else empty. Ready for new text after it."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def check_text(text: str) -> str:
    """``text`` itself; raises `TokenizerError` if it is no str or holds a lone surrogate, which has no UTF-8 form."""
    if not isinstance(text, str):
        raise TokenizerError(f"text must be str, not {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start},"
                " which is no Unicode text; decode the source with errors='replace'"
            ) from error
    return text


def split_long(text: str) -> Iterator[str]:
    """Pieces of at most 400,000 characters without a run of more than 25,000 (non-)whitespace characters."""
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_CHARS):
        chunk = text[start : start + MAX_CHARS]
        begin = 0
        for run in _RUNS.finditer(chunk):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
