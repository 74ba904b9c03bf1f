"""The interface of all tokenizers, whatever vocabulary they have.

Two classes implement it: `ranks_tokenizer.RanksTokenizer` for vocabularies of Llama 3's kind, and
`library_tokenizer.LibraryTokenizer` for all others. `Tokenizer.from_file`, `from_folder` and `train` choose.

*Text never becomes a special token* unless that is asked for: someone who types ``<|eot_id|>`` gets ordinary
tokens. Special ids are inserted by code, mostly by the chat format (``tokenizer.chat``), which comes with the
vocabulary and the chat template of a checkpoint.
"""

from __future__ import annotations

import codecs
import copy
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import ChatError, TokenizerError
from ..files import write_atomically
from .chat_choice import choose_chat_format
from .chat_format import ChatFormat
from .vocabulary import Vocabulary

ROLES = ("bos", "eos", "pad", "unk")
"""Special tokens that a tokenizer names, in the words of Hugging Face's settings."""
CONTINUE = "it can still continue text (herd chat --complete, herd eval --mode base)"
"""What can be done with a model whose dialogs cannot be written."""


class Tokenizer(ABC):
    """A vocabulary with the settings of its checkpoint. It does not change after it was made."""

    readers: ClassVar[dict[str, Callable[[Path], Tokenizer]]] = {}
    """Functions that read a file with a suffix. The empty suffix is for folders."""
    trainer: ClassVar[Callable[[Iterable[str], int], Tokenizer]]

    vocab_size: int
    special_tokens: dict[str, int]
    """Control tokens by name."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None = None
    add_bos: bool = True
    """Whether a text begins with ``bos_id``."""
    adds_space: bool = False
    """Whether a text is encoded as if it began with a space, as SentencePiece does."""
    missing_bytes: frozenset[int] = frozenset()
    """Bytes that the vocabulary cannot express."""
    chat_template: str | None = None
    tool_template: str | None = None
    """The checkpoint's chat template for dialogs with tools, if it is another one."""
    token_names: dict[str, str]
    """Special tokens by role ("bos_token"), as chat templates ask for them."""
    where: str = "this tokenizer"
    """Its name in messages: the folder or file that it was read from."""
    _stop_ids: frozenset[int] = frozenset()

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Tokenizer:
        """Read a ``tokenizer.model`` (ranks or SentencePiece), a ``tokenizer.json``, a ``.gguf`` or a folder.

        Raises `TokenizerError` for a file that is missing or malformed.
        """
        path = Path(path)
        if path.is_dir():
            return Tokenizer.from_folder(path)
        return Tokenizer.readers.get(path.suffix, Tokenizer.readers[".model"])(path)

    @staticmethod
    def from_folder(folder: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a folder in Hugging Face's layout, with its chat template and stop tokens."""
        return Tokenizer.readers[""](Path(folder))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a tokenizer of Llama 3's kind. See `RanksTokenizer.train`."""
        return Tokenizer.trainer(texts, vocab_size)

    def with_settings(
        self,
        *,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        token_names: dict[str, str] | None = None,
        where: str = "",
    ) -> Self:
        """Return a copy with the settings of a checkpoint. ``stop_ids`` are added to its own."""
        out = copy.copy(self)
        for name in ("_choice", "stop_ids"):
            out.__dict__.pop(name, None)
        out._stop_ids = self._stop_ids | frozenset(stop_ids)
        out.chat_template, out.tool_template = chat_template, tool_template
        out.token_names = dict(self.token_names)
        for role, name in (token_names or {}).items():
            if name in self.special_tokens or role not in self.token_names:
                out.token_names[role] = name
        out.where = where or self.where
        return out

    def with_settings_of(
        self, other: Tokenizer, *, stop_ids: Iterable[int] | None = None, where: str = ""
    ) -> Self:
        """Return a copy with the settings of the checkpoint of ``other``.

        ``stop_ids`` are the ids that its stop tokens have here, if these are others.
        """
        return self.with_settings(
            stop_ids=other.own_stop_ids if stop_ids is None else stop_ids,
            chat_template=other.chat_template,
            tool_template=other.tool_template,
            token_names=other.token_names,
            where=where or other.where,
        )

    # Dialogs

    @cached_property
    def _choice(self) -> tuple[ChatFormat | None, str | None]:
        return choose_chat_format(self)

    @property
    def chat(self) -> ChatFormat | None:
        """The format of dialogs. None if there is none, for the reason in `chat_problem`."""
        return self._choice[0]

    @property
    def chat_problem(self) -> str | None:
        """The reason, in one line, why the tokenizer has no chat format. None if it has one."""
        return self._choice[1]

    def require_chat(self, cure: str = CONTINUE) -> ChatFormat:
        """Return the format of dialogs. Raises `ChatError` that ends with ``cure`` if there is none."""
        if self.chat is None:
            raise ChatError(f"{self.chat_problem}; {cure}")
        return self.chat

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """All tokens that end an answer: the tokenizer's, the model configuration's and the template's."""
        return self._stop_ids | (self.chat.stop_ids if self.chat else frozenset())

    # Text to ids

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Return the ids of ``text``.

        ``bos``: begin with the token that begins every text, if the vocabulary has one (`add_bos`).
        ``eos``: end with ``eos_id``. Special tokens spelled in ``text`` are ordinary text unless ``special``.
        Raises `TokenizerError` for a lone surrogate.
        """
        check_text(text)
        ids = self.start_ids if bos else []
        ids += self.encode_with_special(text)[0] if special else self._encode(text)
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the ids of text in which special tokens are ordinary text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, n_threads: int = 2) -> list[list[int]]:
        """Return `encode` of many texts, on several threads."""

    @abstractmethod
    def encode_with_offsets(self, text: str, *, continued: bool = False) -> tuple[list[int], list[int]]:
        """Return the ids of plain ``text`` and the start of each in characters.

        ``continued``: the text follows a special token, where some vocabularies add no space before it.
        """

    def encode_with_special(
        self, text: str, clean: Callable[[str], str] | None = None
    ) -> tuple[list[int], list[int]]:
        """Return ids and the start of each in characters. A special token in ``text`` becomes its id.

        ``clean`` changes the text between special tokens before it is encoded. Starts then count the
        characters of the changed text.
        """
        ids: list[int] = []
        starts: list[int] = []
        place = 0
        for number, piece in enumerate(self.split_special(text)):
            if number % 2:
                found, where = [self.special_tokens[piece]], [0]
            else:
                piece = piece if clean is None else clean(piece)
                found, where = self.encode_with_offsets(piece, continued=number > 0) if piece else ([], [])
            ids += found
            starts += [place + start for start in where]
            place += len(piece)
        return ids, starts

    def split_special(self, text: str) -> list[str]:
        """Split ``text`` at the special tokens that it spells. These are the odd elements of the list."""
        return self._special_pattern.split(text) if self.special_tokens else [text]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @property
    def own_stop_ids(self) -> frozenset[int]:
        """The stop tokens of the vocabulary and the checkpoint, without the chat template's."""
        return self._stop_ids

    @property
    def start_ids(self) -> list[int]:
        """The ids that begin every text: ``[bos_id]``, or nothing."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    @property
    def prefix_ids(self) -> list[int]:
        """The ids to put before a text to score its first token: `start_ids`, or else the end of a text."""
        return self.start_ids or [self.eos_id or 0]

    @property
    def n_ordinary(self) -> int:
        """The end of the ordinary tokens: from this id on, every id is a special token."""
        special = set(self.special_tokens.values())
        return next((n for n in range(self.vocab_size, 0, -1) if n - 1 not in special), 0)

    # Ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Return the text of ids, without the space that a SentencePiece vocabulary puts before every text.

        Special tokens are spelled out, or left out with ``skip_special``. Ids that end within a character
        give U+FFFD, or raise `TokenizerError` with ``errors="strict"``.
        """
        text = self.decode_bytes(ids, skip_special=skip_special)
        if self.adds_space and text.startswith(b" "):
            text = text[1:]
        try:
            return text.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"ids are not UTF-8 text ({error}); decode with errors='replace'") from error

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Return the bytes of ids. Raises `TokenizerError` for an id outside the vocabulary."""
        special = set(self.special_tokens.values()) if skip_special else ()
        return b"".join([self.token_bytes(id_) for id_ in ids if int(id_) not in special])

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token: for a special token its spelling, for an unused id nothing."""
        id = int(id)
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[id]

    @cached_property
    @abstractmethod
    def _tokens(self) -> list[bytes]:
        """The bytes of all tokens in the order of their ids."""

    # Identity and files

    @cached_property
    @abstractmethod
    def sha256(self) -> str:
        """The hex sha256 that identifies the vocabulary."""

    @cached_property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The tokens with merges or scores, as GGUF files store them.

        Raises `TokenizerError` for a vocabulary that GGUF cannot express.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str], *, model_max_length: int = 131072) -> None:
        """Write the files of the tokenizer, each atomically, so that transformers loads them without code."""

    def _save_settings(
        self, folder: Path, template: str | None, added: dict[str, int], more: dict[str, Any]
    ) -> None:
        """Write ``tokenizer_config.json`` (with the chat template) and ``special_tokens_map.json``."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        config: dict[str, Any] = {
            "added_tokens_decoder": {str(id_): {"content": name, **flags} for name, id_ in added.items()},
            **self.token_names,
        }
        if self.tool_template is not None:
            named = {"default": template, "tool_use": self.tool_template}
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        elif template is not None:
            config["chat_template"] = template
        config |= {
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_atomically(folder / "tokenizer_config.json", _json(config | more))
        write_atomically(folder / "special_tokens_map.json", _json(self.token_names))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self.sha256, self.special_tokens) == (other.sha256, other.special_tokens)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


class StreamDecoder:
    """A decoder for a stream of ids, which holds back an unfinished character.

    All pieces and the one of `finish` together are the text of ``tokenizer.decode_bytes(all_ids)``.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        """Return the text that becomes certain with these ids, which may be empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([ids] if isinstance(ids, int) else ids))

    def finish(self) -> str:
        """Return the text held back (U+FFFD for an unfinished character), and start again."""
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


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
