"""Tokenizers of all other models: a `tokenizer.json`, a GGUF vocabulary or a SentencePiece file.

Merging and cutting are done by the `tokenizers` library. This file adds what the library does not do: text that spells
a special token stays text; a token's exact bytes; and a report of bytes that a vocabulary cannot express. (SmolLM2's
lacks 21 of the 256 byte tokens, and the library drops such bytes without a word.)
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from ..errors import TokenizerError
from .ranks import unspell
from .tokenizer import check_text
from .vocabulary import SPACE

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library; it does not change after it is made.

    ``special_tokens`` are the control tokens by name. ``bos_id``, ``eos_id``, ``pad_id`` and ``unk_id`` are None where
    the vocabulary has no such token; ``add_bos`` says whether a text begins with ``bos_id``.
    """

    def __init__(
        self,
        library: Library,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        unk: str | None = None,
        add_bos: bool = False,
    ) -> None:
        self._library = library
        library.encode_special_tokens = True  # special tokens spelled in a text are text
        library.no_truncation()
        library.no_padding()
        added = library.get_added_tokens_decoder()
        self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_tokens = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        self._added = {id_: token.content for id_, token in added.items()}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if name is None else library.token_to_id(name) for name in (bos, eos, pad, unk)
        )
        self.add_bos = add_bos and self.bos_id is not None
        self.stop_ids = frozenset({self.eos_id} - {None})
        self._byte_level = "ByteLevel" in json.dumps(json.loads(library.to_str())["decoder"])

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of ``text``, which is never read as special tokens.

        Warns of characters that the vocabulary cannot express; each of their bytes becomes ``unk_id``. Raises
        `TokenizerError` for a lone surrogate, or for such a character where the vocabulary has no unknown token.
        """
        check_text(text)
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        if self.missing_bytes and (lost := set(self._inexpressible.findall(text))):
            ids += self._with_unknown(text, lost)
        else:
            ids += self._library.encode(text, add_special_tokens=False).ids
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def encode_with_special(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of ``text``, in which special tokens are read as such, and where each starts (characters)."""
        return self._with_offsets(self._reading_special, text)

    def encode_with_offsets(self, text: str, *, continued: bool = False) -> tuple[list[int], list[int]]:
        """Return the ids of plain ``text`` and where each starts (characters).

        ``continued``: the text follows a special token, where some vocabularies add no space before it.
        """
        if not continued:
            return self._with_offsets(self._library, text)
        ids, starts = self._with_offsets(self._continuing, self._separator + text)
        return ids[1:], [start - len(self._separator) for start in starts[1:]]

    def _with_offsets(self, library: Library, text: str) -> tuple[list[int], list[int]]:
        encoding = library.encode(check_text(text), add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    @cached_property
    def _reading_special(self) -> Library:
        """A copy of the library's tokenizer that turns special tokens spelled in a text into their ids."""
        copy = Library.from_str(self._library.to_str())
        copy.encode_special_tokens = False
        return copy

    @cached_property
    def _continuing(self) -> Library:
        """A copy with one more token, after which a text is encoded as it is after a special token."""
        copy = Library.from_str(self._library.to_str())
        copy.encode_special_tokens = True
        copy.add_tokens([AddedToken(self._separator, normalized=False)])
        return copy

    @cached_property
    def _separator(self) -> str:
        """A character without meaning that the vocabulary does not have."""
        return next(
            chr(code) for code in range(0xF8FF, 0xE000, -1) if self._library.token_to_id(chr(code)) is None
        )

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = 2) -> list[list[int]]:
        """Return `encode` of many texts; the library chooses the number of threads."""
        if self.missing_bytes and any(map(self._inexpressible.search, texts)):
            return [self.encode(text) for text in texts]
        found = self._library.encode_batch([check_text(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Return the text of ``ids``, without the space that a SentencePiece vocabulary puts before every text."""
        text = self.decode_bytes(ids, skip_special=skip_special)
        if self.adds_space and text.startswith(b" "):
            text = text[1:]
        try:
            return text.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"ids are not UTF-8 text ({error}); decode with errors='replace'") from error

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Return the bytes of ``ids``; raises `TokenizerError` for an id outside the vocabulary."""
        special = set(self.special_tokens.values()) if skip_special else ()
        return b"".join([self.token_bytes(id_) for id_ in ids if id_ not in special])

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token: for a special token its spelling, for an unused id nothing."""
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[id]

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [self._bytes_of(id_) for id_ in range(self.vocab_size)]

    def _bytes_of(self, id: int) -> bytes:
        word = self._added.get(id)
        if word is not None:
            return word.encode()
        word = self._library.id_to_token(id) or ""
        if self._byte_level:
            try:
                return unspell(word)
            except KeyError:
                return word.encode()
        byte = _BYTE_TOKEN.fullmatch(word)
        return bytes([int(byte[1], 16)]) if byte else word.replace(SPACE, " ").encode()

    @cached_property
    def adds_space(self) -> bool:
        """Whether a text is encoded as if a space stood before it, as SentencePiece does."""
        ids = self._library.encode("x", add_special_tokens=False).ids
        return b"".join(self._bytes_of(id_) for id_ in ids).startswith(b" ")

    @cached_property
    def missing_bytes(self) -> frozenset[int]:
        """The bytes that no token expresses alone, so that a text with them may not come back."""
        single = {token[0] for token in self._tokens if len(token) == 1}
        if not self._byte_level and not any(_BYTE_TOKEN.fullmatch(w) for w in self._library.get_vocab()):
            return frozenset()  # characters, not bytes, are the smallest pieces
        return frozenset(range(256)) - single

    @cached_property
    def _inexpressible(self) -> re.Pattern[str]:
        """Characters whose UTF-8 has a missing byte."""
        missing = self.missing_bytes
        ranges = []
        for start, stop in ((0, 0x80), (0x80, 0xD800), (0xE000, 0x110000)):
            begin = None
            for code in range(start, stop + 1):
                bad = code < stop and not missing.isdisjoint(chr(code).encode())
                if bad and begin is None:
                    begin = code
                elif not bad and begin is not None:
                    ranges.append(f"{re.escape(chr(begin))}-{re.escape(chr(code - 1))}")
                    begin = None
        return re.compile(f"[{''.join(ranges)}]") if ranges else re.compile(r"(?!)")

    def _with_unknown(self, text: str, lost: set[str]) -> list[int]:
        names = ", ".join(f"U+{ord(char):04X}" for char in sorted(lost)[:5])
        if self.unk_id is None:
            raise TokenizerError(
                f"the vocabulary cannot express {names}, and it has no token for unknown text"
            )
        warnings.warn(
            f"the vocabulary cannot express {names}: its bytes become {self._added.get(self.unk_id)!r}",
            stacklevel=3,
        )
        ids: list[int] = []
        begin = 0
        for match in self._inexpressible.finditer(text):
            ids += self._library.encode(text[begin : match.start()], add_special_tokens=False).ids
            ids += [self._single.get(byte, self.unk_id) for byte in match[0].encode()]
            begin = match.end()
        return ids + self._library.encode(text[begin:], add_special_tokens=False).ids

    @cached_property
    def _single(self) -> dict[int, int]:
        """Ids of the tokens that are one byte."""
        return {token[0]: id_ for id_, token in enumerate(self._tokens) if len(token) == 1}

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the tokens in the order of their ids: the vocabulary's identity."""
        digest = hashlib.sha256()
        for token in self._tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`."""
        return json.loads(self._library.to_str())

    def __repr__(self) -> str:
        return f"LibraryTokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"
