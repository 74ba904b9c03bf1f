"""Tokenizers of all other models: a `tokenizer.json`, a GGUF vocabulary or a SentencePiece file.

Merging and splitting are done by the `tokenizers` library. This file adds three things: text that spells a
special token stays text, the exact bytes of a token are known, and bytes that a vocabulary cannot express are
reported. (SmolLM2's lacks 21 of the 256 byte tokens, and tokenizers drops such bytes silently.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from ..errors import TokenizerError
from ..files import write_atomically
from .ranks import unspell
from .tokenizer import ROLES, Tokenizer, check_text
from .vocabulary import SPACE, Vocabulary, vocabulary_of

_LOCK = threading.Lock()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    ``bos``, ``eos``, ``pad`` and ``unk`` are names of special tokens. A name that is not in the vocabulary
    is ignored. A text begins with ``bos`` if ``add_bos`` or if the library's tokenizer puts it
    there. ``vocabulary``: the source of the library's tokenizer, if it was not a `tokenizer.json`.
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
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._library = library
        self._readers: dict[bool, Library] = {}
        self._vocabulary = vocabulary
        library.no_truncation()
        library.no_padding()
        added = library.get_added_tokens_decoder()
        self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_tokens = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        self._added = {id_: token.content for id_, token in added.items()}
        names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
        self.token_names = {role: name for role, name in names.items() if name is not None}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if name is None else library.token_to_id(name) for name in names.values()
        )
        begins = library.encode("").ids[:1] == [self.bos_id]
        self.add_bos = self.bos_id is not None and (add_bos or begins)
        self._stop_ids = frozenset({self.eos_id} - {None})  # type: ignore[arg-type]
        self._byte_level = "ByteLevel" in repr(library.decoder)

    def _encode(self, text: str) -> list[int]:
        """Return the ids of plain text.

        Warns about characters that the vocabulary cannot express. Each of their bytes becomes ``unk_id``.
        Raises `TokenizerError` if there are such characters and no unknown token.
        """
        if self.missing_bytes and (lost := set(self._inexpressible.findall(text))):
            return self._with_unknown(text, lost)
        return self._reader(special=False).encode(text, add_special_tokens=False).ids

    def encode_with_special(
        self, text: str, clean: Callable[[str], str] | None = None
    ) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode_with_special`."""
        if clean is not None:
            return super().encode_with_special(text, clean)
        return self._with_offsets(self._reader(special=True), text)

    def encode_with_offsets(self, text: str, *, continued: bool = False) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode_with_offsets`."""
        if not continued:
            return self._with_offsets(self._reader(special=False), text)
        ids, starts = self._with_offsets(self._continuing, self._separator + text)
        return ids[1:], [start - len(self._separator) for start in starts[1:]]

    def _with_offsets(self, library: Library, text: str) -> tuple[list[int], list[int]]:
        encoding = library.encode(check_text(text), add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def _reader(self, *, special: bool) -> Library:
        """Return a `tokenizers.Tokenizer` that reads special tokens in a text as ids, or as plain text.

        The one that is needed first is the original. A copy for the other takes up to half a second.
        """
        with _LOCK:
            if special not in self._readers:
                library = Library.from_str(self._library.to_str()) if self._readers else self._library
                library.encode_special_tokens = not special
                self._readers[special] = library
            return self._readers[special]

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
        """Return `encode` of many texts. The library chooses the number of threads."""
        if self.missing_bytes and any(map(self._inexpressible.search, texts)):
            return [self.encode(text) for text in texts]
        found = self._reader(special=False).encode_batch(
            [check_text(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in found]

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`. It lacks a BOS that only `add_bos` puts there."""
        return self._library.to_str()

    def rebuilt(self, content: dict[str, Any]) -> LibraryTokenizer:
        """Return a tokenizer with another content of its `tokenizer.json`, in the form of `json.loads`."""
        library = Library.from_str(json.dumps(content, ensure_ascii=False))
        names = {role: self.token_names.get(f"{role}_token") for role in ROLES}
        return LibraryTokenizer(library, **names, add_bos=self.add_bos, vocabulary=None)

    def pieces_of(self, words: Iterable[str]) -> list[list[int]]:
        """Return the ids that each of the spellings of other tokens is merged to."""
        model = self._library.model
        return [[token.id for token in model.tokenize(word)] for word in words]

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [self._bytes_of(id_) for id_ in range(self.vocab_size)]

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        if "_tokens" in vars(self) or not 0 <= int(id) < self.vocab_size:
            return super().token_bytes(id)
        return self._bytes_of(int(id))  # one token is wanted and not the whole vocabulary

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
    def adds_space(self) -> bool:  # type: ignore[override]
        """See `Tokenizer.adds_space`."""
        ids = self._library.encode("x", add_special_tokens=False).ids
        return b"".join(self._bytes_of(id_) for id_ in ids).startswith(b" ")

    @cached_property
    def missing_bytes(self) -> frozenset[int]:  # type: ignore[override]
        """The bytes that are not a token by themselves, so that a text with them may be lost in encoding."""
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
            raise TokenizerError(f"the vocabulary cannot express {names} and has no token for unknown text")
        warnings.warn(
            f"the vocabulary cannot express {names}: its bytes become {self._added.get(self.unk_id)!r}",
            stacklevel=3,
        )
        ids: list[int] = []
        begin = 0
        for match in self._inexpressible.finditer(text):
            ids += (
                self._reader(special=False).encode(text[begin : match.start()], add_special_tokens=False).ids
            )
            ids += [self._single.get(byte, self.unk_id) for byte in match[0].encode()]
            begin = match.end()
        return ids + self._reader(special=False).encode(text[begin:], add_special_tokens=False).ids

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

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        return self._vocabulary or vocabulary_of(self._library)

    def save(self, folder: str | os.PathLike[str], *, model_max_length: int = 131072) -> None:
        """See `Tokenizer.save`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(self.to_json())
        if self.add_bos and self._library.encode("").ids[:1] != [self.bos_id]:
            content["post_processor"] = _beginning_with(self.token_names["bos_token"], self.start_ids[0])
        write_atomically(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
        more = {"model_max_length": model_max_length, "add_bos_token": self.add_bos}
        self._save_settings(folder, self.chat_template, {}, more)


def read_library(path: Path) -> Library:
    """Read a `tokenizer.json` with the library. Raises `TokenizerError` for what it cannot read."""
    try:
        return Library.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:  # the library raises plain exceptions, and its panics are not even those
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TokenizerError(f"{path}: the tokenizers library cannot read it ({error})") from error


def _beginning_with(bos: str, bos_id: int) -> dict[str, Any]:
    """Return the post-processor that puts ``bos`` before every text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
