"""The Llama 3 tokenizer: text to token ids and back without loss.

Text is cut into pieces by a regular expression (words with their leading space, up to three digits,
punctuation, line breaks), each piece is byte-pair encoded by its ranks (`ranks.py`), and 256 special tokens
follow after the ranks: ``<|begin_of_text|>`` is id ``n_ranks`` and ``<|eot_id|>`` is ``n_ranks + 9``, with
the names and order of Llama 3.1. tiktoken does the work; Hugging Face's `tokenizers` only trains. Every text
comes back exactly.

Source: llama-models ``models/llama3/tokenizer.py`` (regular expression, special tokens, limits for long
inputs).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken

from ..errors import TokenizerError
from ..files import write_atomically
from . import tokenizer_json
from .ranks import Ranks, check_ranks, merges, ranks_bytes, spell
from .tokenizer import Tokenizer, check_text
from .vocabulary import CONTROL, NORMAL, Vocabulary

N_SPECIAL = 256
# Ids n_ranks + 0, 1, 2, ... of the 3.1 release. Llama 3.2 renamed number 11 to <|image|>. The ids are
# the same.
# fmt: off
NAMED_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
)
# fmt: on
SPECIAL_TOKENS: tuple[str, ...] = tuple(
    f"<|{name}|>" for name in (*NAMED_SPECIAL, *(f"reserved_special_token_{i}" for i in range(2, 247)))
)
NEEDED_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
"""The special tokens by which a vocabulary is recognized as Llama 3's."""

# tiktoken's regular expressions fail on very long inputs and take quadratic time in very long runs. These are
# Meta's limits. A cut there can cost a token, never text.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


class RanksTokenizer(Tokenizer):
    """A tokenizer of Llama 3's kind."""

    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(self, ranks: Ranks, special_tokens: Mapping[str, int] | None = None):
        """``ranks``: bytes to 0..n-1. ``special_tokens``: name to id, by default those of Llama 3.1."""
        check_ranks(ranks, "ranks")
        self.ranks = ranks
        self.n_ranks = len(ranks)
        default = {name: self.n_ranks + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.special_tokens = dict(default if special_tokens is None else special_tokens)
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
        self._stop_ids = frozenset({self.eos_id, self.eom_id, self.eot_id})
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        self.token_names = {role: self._special_names[id_] for role, id_ in roles.items()}

    def _special_id(self, name: str) -> int:
        """Return the id of ``<|name|>``. Llama 3 has the same id under a reserved name."""
        id_ = self.special_tokens.get(f"<|{name}|>", self.n_ranks + NAMED_SPECIAL.index(name))
        if id_ >= self.vocab_size:
            raise TokenizerError(f"special token <|{name}|> is missing: not a Llama 3 tokenizer")
        return id_

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> RanksTokenizer:
        """Train byte-level BPE on texts, deterministically. ``vocab_size`` counts the 256 special tokens.

        The 256 bytes come first, then merges in the order in which they were learned. Raises `TokenizerError`
        if ``vocab_size`` is below 512 or the texts do not have enough distinct pairs for it.
        """
        n_ranks = vocab_size - N_SPECIAL
        if n_ranks < 256:
            raise TokenizerError(
                f"vocab_size={vocab_size}: give at least 256 bytes + {N_SPECIAL} special tokens"
            )
        ranks = tokenizer_json.train_ranks(map(check_text, texts), n_ranks)
        if len(ranks) < n_ranks:
            raise TokenizerError(
                f"vocab_size={vocab_size} is more than these texts can fill: "
                f"use {len(ranks) + N_SPECIAL} or more text"
            )
        return RanksTokenizer(ranks)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_long(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_with_offsets(self, text: str, *, continued: bool = False) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode_with_offsets`. The text before makes no difference here."""
        ids = self.encode(text)
        starts, n_characters = [], 0
        for id_ in ids:
            token = self._tokens[id_]
            first_continues = token[0] & 0xC0 == 0x80  # a token may begin within a character
            starts.append(n_characters - first_continues)
            n_characters += sum(byte & 0xC0 != 0x80 for byte in token)
        return ids, starts

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = 2) -> list[list[int]]:
        """See `Tokenizer.encode_batch` (tiktoken releases the interpreter's lock)."""
        pieces = [list(split_long(check_text(text))) for text in texts]
        flat = iter(
            self._encoding.encode_ordinary_batch([p for some in pieces for p in some], num_threads=n_threads)
        )
        return [[id_ for _ in some for id_ in next(flat)] for some in pieces]

    @cached_property
    def _tokens(self) -> list[bytes]:
        in_order = sorted(self.ranks, key=self.ranks.__getitem__)
        return in_order + [self._special_names[id_].encode() for id_ in range(self.n_ranks, self.vocab_size)]

    def pieces_of(self, tokens: Iterable[bytes]) -> list[list[int]]:
        """Return the ids that each of the tokens of another vocabulary is encoded to."""
        encode = self._encoding._core_bpe.encode_single_piece
        return [encode(token) for token in tokens]

    @cached_property
    def sha256(self) -> str:
        """The hex sha256 of the ranks. For Meta's tokenizer it is the hash of Meta's file."""
        return hashlib.sha256(ranks_bytes(self.ranks)).hexdigest()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        tokens = [spell(self._tokens[id_]) for id_ in range(self.n_ranks)]
        special = [self._special_names[id_] for id_ in range(self.n_ranks, self.vocab_size)]
        types = [NORMAL] * len(tokens) + [CONTROL] * len(special)
        pairs = [f"{spell(left)} {spell(right)}" for left, right in merges(self.ranks)]
        return Vocabulary(tokens + special, types, merges=pairs, pre="llama-bpe")

    def save(self, folder: str | os.PathLike[str], *, model_max_length: int = 131072) -> None:
        """See `Tokenizer.save`. ``tokenizer.model`` has the ranks, the other files are for Hugging Face."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = tokenizer_json.tokenizer_json(self.ranks, self.special_tokens, self.bos_id)
        write_atomically(folder / "tokenizer.model", ranks_bytes(self.ranks))
        write_atomically(folder / "tokenizer.json", content)
        template = self.chat_template or tokenizer_json.CHAT_TEMPLATE
        self._save_settings(folder, template, self.special_tokens, {"model_max_length": model_max_length})


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
