"""The Llama 3 tokenizer: text to token ids and back without loss.

Text is cut into pieces by a regular expression (words with their leading space, up to three digits,
punctuation, line breaks), each piece is byte-pair encoded by its ranks (`ranks.py`), and 256 special tokens
follow after the ranks: ``<|begin_of_text|>`` is id ``n_ranks`` and ``<|eot_id|>`` is ``n_ranks + 9``, with
the names and order of Llama 3.1. tiktoken does the work; Hugging Face's `tokenizers` only trains.

Two promises hold for every text: it comes back exactly, and *text never becomes a special token*. Someone who
types ``<|eot_id|>`` gets its seven ordinary tokens; only code inserts special ids (`chat.py`).

Source: llama-models ``models/llama3/tokenizer.py`` (regular expression, special tokens, limits for long
inputs).
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

N_SPECIAL = 256
# Ids n_ranks + 0, 1, 2, ... of the 3.1 release. Llama 3.2 renamed number 11 to <|image|>; the ids are the
# same.
# fmt: off
NAMED_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
)
# fmt: on
SPECIAL_TOKENS: tuple[str, ...] = tuple(
    f"<|{name}|>" for name in (*NAMED_SPECIAL, *(f"reserved_special_token_{i}" for i in range(2, 247)))
)

# tiktoken's regular expressions fail on very long inputs and take quadratic time in very long runs. These are
# Meta's limits. A cut there can cost a token, never text.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


class Tokenizer:
    """A Llama 3 tokenizer, which does not change after `from_file`, `from_folder` or `train` made it."""

    def __init__(self, ranks: Ranks, special_tokens: Mapping[str, int] | None = None):
        """``ranks``: bytes to 0..n-1. ``special_tokens``: name to id, by default those of Llama 3.1."""
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
            "llama3",
            pat_str=tokenizer_json.PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self._special_names = {id_: name for name, id_ in self.special_tokens.items()}
        self.bos_id = self._special_id("begin_of_text")
        self.eos_id = self._special_id("end_of_text")
        self.pad_id = self._special_id("finetune_right_pad_id")
        self.start_header_id = self._special_id("start_header_id")
        self.end_header_id = self._special_id("end_header_id")
        self.eom_id = self._special_id("eom_id")
        self.eot_id = self._special_id("eot_id")
        self.python_tag_id = self._special_id("python_tag")
        self.stop_ids = frozenset({self.eos_id, self.eom_id, self.eot_id})
        self.chat_template: str | None = None  # a checkpoint's own, where it is not Llama 3.1's
        self.chat_problem: str | None = None  # why dialogs must not be written in Llama 3.1's format

    def _special_id(self, name: str) -> int:
        """Return the id of ``<|name|>``, which Llama 3 has at the same place where it calls it reserved."""
        id_ = self.special_tokens.get(f"<|{name}|>", self.n_ranks + NAMED_SPECIAL.index(name))
        if id_ >= self.vocab_size:
            raise TokenizerError(f"special token <|{name}|> is missing: not a Llama 3 tokenizer")
        return id_

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read Meta's ranks file (``tokenizer.model``), a ``tokenizer.json``, or a folder.

        Raises `TokenizerError` for a file that is missing, malformed or not of Llama 3's kind.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_folder(path)
        return (
            cls(*tokenizer_json.read_tokenizer_json(path))
            if path.suffix == ".json"
            else cls(read_ranks(path))
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read a folder's ``tokenizer.model`` or ``tokenizer.json``. If both exist, they must agree."""
        model, json_ = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
        if not model.exists() and not json_.exists():
            raise TokenizerError(f"{folder}: holds neither tokenizer.model nor tokenizer.json")
        if not (model.exists() and json_.exists()):
            return cls.from_file(model if model.exists() else json_)
        ranks = read_ranks(model)
        vocabulary, special_tokens = tokenizer_json.read_tokenizer_json(json_, compare_merges=False)
        if vocabulary != ranks:
            raise TokenizerError(
                f"{folder}: tokenizer.model and tokenizer.json disagree; remove the wrong one"
            )
        return cls(ranks, special_tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE on texts, deterministically. ``vocab_size`` counts the 256 special tokens.

        The 256 bytes come first, then merges in the order in which they were learned. Raises `TokenizerError`
        if ``vocab_size`` is below 512 or the texts do not have enough distinct pairs for it.
        """
        n_ranks = vocab_size - N_SPECIAL
        if n_ranks < 256:
            raise TokenizerError(
                f"vocab_size={vocab_size} is below 512 = 256 bytes + {N_SPECIAL} special tokens"
            )
        ranks = tokenizer_json.train_ranks(map(check_text, texts), n_ranks)
        if len(ranks) < n_ranks:
            raise TokenizerError(
                f"vocab_size={vocab_size} is more than these texts can fill: "
                f"use {len(ranks) + N_SPECIAL} or more text"
            )
        return cls(ranks)

    def with_settings(
        self, *, stop_ids: Iterable[int], chat_problem: str | None, chat_template: str | None
    ) -> Tokenizer:
        """Return a copy with more stop tokens.

        For a checkpoint with another chat format, also with the reason against chat and the checkpoint's own
        template, which `save` writes again.
        """
        out = copy.copy(self)
        out.stop_ids = self.stop_ids | frozenset(stop_ids)
        out.chat_problem, out.chat_template = chat_problem, chat_template
        return out

    def require_chat_format(self) -> None:
        """Raise `ChatError` if dialogs must not be written in Llama 3.1's format."""
        if self.chat_problem is not None:
            raise ChatError(self.chat_problem)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of ``text``, between ``<|begin_of_text|>`` and ``<|end_of_text|>`` if asked.

        Special tokens that are spelled in ``text`` are ordinary text. Raises `TokenizerError` for a lone
        surrogate.
        """
        ids = [self.bos_id] if bos else []
        for piece in split_long(check_text(text)):
            ids += self._encoding.encode_ordinary(piece)
        return [*ids, self.eos_id] if eos else ids

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = 2) -> list[list[int]]:
        """Return `encode` of many texts, on several threads (tiktoken releases the interpreter's lock)."""
        pieces = [list(split_long(check_text(text))) for text in texts]
        flat = iter(
            self._encoding.encode_ordinary_batch([p for some in pieces for p in some], num_threads=n_threads)
        )
        return [[id_ for _ in some for id_ in next(flat)] for some in pieces]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Return the text of ids. Special tokens are spelled out, or left out with ``skip_special``.

        Ids that end within a character give U+FFFD, or raise `TokenizerError` with ``errors="strict"``.
        """
        try:
            return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"ids are not UTF-8 text ({error}); decode with errors='replace'") from error

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Return the bytes of ids. Raises `TokenizerError` for an id outside the vocabulary."""
        skipped = self._special_names if skip_special else {}
        return b"".join([self.token_bytes(id_) for id_ in ids if int(id_) not in skipped])

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token; for a special token its spelling."""
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
        """The hex sha256 of the ranks, which identifies the vocabulary. Meta's is that of Meta's file."""
        return ranks_sha256(self.ranks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self.ranks, self.special_tokens) == (other.ranks, other.special_tokens)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    def save(self, folder: str | os.PathLike[str], *, model_max_length: int = 131072) -> None:
        """Write the files of a tokenizer, each atomically.

        ``tokenizer.model`` has the ranks. ``tokenizer.json``, ``tokenizer_config.json`` (with the chat
        template) and ``special_tokens_map.json`` are for Hugging Face and others.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        roles = {role: self._special_names[id_] for role, id_ in ids.items()}
        template = self.chat_template or tokenizer_json.CHAT_TEMPLATE
        config = tokenizer_json.tokenizer_config(self.special_tokens, roles, template, model_max_length)
        content = tokenizer_json.tokenizer_json(self.ranks, self.special_tokens, self.bos_id)
        write_atomically(folder / "tokenizer.model", ranks_bytes(self.ranks))
        write_atomically(folder / "tokenizer.json", content)
        write_atomically(folder / "tokenizer_config.json", _json(config))
        write_atomically(folder / "special_tokens_map.json", _json(roles))


class StreamDecoder:
    """A decoder for a stream of ids, which holds back an unfinished character.

    All pieces together, with that of `finish`, are ``tokenizer.decode(all_ids)``.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        """Return the text that becomes certain with these ids; it may be empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([ids] if isinstance(ids, int) else ids))

    def finish(self) -> str:
        """Return what was held back (U+FFFD for an unfinished character), and start again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def check_text(text: str) -> str:
    """Return ``text``. Raises `TokenizerError` unless it is a str without lone surrogates."""
    if not isinstance(text, str):
        raise TokenizerError(f"text must be str, not {type(text).__name__}")
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start},"
            " which is not Unicode text; decode the source with errors='replace'"
        ) from error
    return text


def split_long(text: str) -> Iterator[str]:
    """Yield pieces of at most `MAX_CHARS` characters, without runs longer than `MAX_RUN`."""
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


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
