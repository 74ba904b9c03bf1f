"""The text of a shrink run: what the student is trained on, and what every model is measured on.

Held-out text is divided into short pieces, so that there are enough of them for an interval, and pieces are
taken from all files in equal numbers of bytes. Dialogs are rendered in the model's chat format. In
distillation every token of them is a target, the user's too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.corpus import Document, load_corpus, read_corpus
from ..data.packing import DialogStream
from ..data.read_dialogs import rendered_dialogs
from ..data.shards import Shards
from ..data.stream import MixStream, Stream, TokenStream
from ..errors import DataError
from ..evals.windows import HeldOut, from_texts
from ..text import Tokenizer
from ..train.sources.base import padding

PIECE_CHARS = 4000
"""Characters of a held-out piece: about a thousand tokens."""
DIALOGS_HELD_OUT = 10
"""One dialog in this many is held out."""


@dataclass(frozen=True)
class Material:
    """Paths of text and of dialogs to train on, and of held-out text (empty: a tenth of ``text``)."""

    text: Sequence[str] = ()
    dialogs: Sequence[str] = ()
    heldout: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.text and not self.dialogs:
            raise DataError("there is nothing to train on: give --text PATH, --dialogs FILE or --self")

    def stream(self, tokenizer: Tokenizer, context: int, folder: Path, seed: int) -> tuple[Stream, str]:
        """Return rows of all text and dialogs, and the hash of both. Writes shards to ``folder`` once."""
        streams: list[Stream] = []
        digest = hashlib.sha256()
        if self.text:
            self._write_shards(tokenizer, folder)
            shards = Shards.open(folder, tokenizer)
            digest.update(shards.sha256.encode())
            streams.append(TokenStream(shards, context, seed))
        if self.dialogs:
            trained = [ids for n, ids in enumerate(self._dialog_ids(tokenizer)) if n % DIALOGS_HELD_OUT]
            digest.update(json.dumps(trained).encode())
            everything = [(ids[: context + 1], [True] * min(len(ids), context + 1)) for ids in trained]
            streams.append(DialogStream(everything, context, seed, pad_id=padding(tokenizer)))
        if len(streams) == 1:
            return streams[0], digest.hexdigest()
        return MixStream(streams, [stream.n_rows for stream in streams], seed), digest.hexdigest()

    def _write_shards(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the shards of the text unless they exist. Other processes that want them wait."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return
            Shards.write(folder, self._training_text(), tokenizer)

    def counts(self, tokenizer: Tokenizer) -> Counter[int]:
        """Return how often each token occurs in the text and in the dialogs that are trained on."""
        found: Counter[int] = Counter()
        for n, ids in enumerate(self._dialog_ids(tokenizer)):
            found.update(ids if n % DIALOGS_HELD_OUT else ())
        for document in self._training_text():
            found.update(tokenizer.encode(document.text))
        return found

    def _training_text(self) -> Iterable[Document]:
        if not self.text:
            return ()
        if self.heldout:
            return read_corpus(list(self.text))
        splits = load_corpus(list(self.text)).splits
        return [*splits["teacher"], *splits["student"]]

    def held_out(self, tokenizer: Tokenizer, n_tokens: int) -> list[HeldOut]:
        """Return about ``n_tokens`` tokens of held-out pieces, the same texts for every tokenizer."""
        by_file: dict[str, list[str]] = {}
        for document in (
            read_corpus(list(self.heldout)) if self.heldout
            else load_corpus(list(self.text)).splits["heldout"] if self.text else ()
        ):  # fmt: skip
            pieces = by_file.setdefault(document.source.partition("#")[0].partition("@")[0], [])
            pieces += _pieces(document.text)
        dialogs = [ids for n, ids in enumerate(self._dialog_ids(tokenizer)) if n % DIALOGS_HELD_OUT == 0]
        kinds = len(by_file) + bool(dialogs)
        if not kinds:
            raise DataError("there is no held-out text to measure on: give --heldout PATH")
        room = 4 * n_tokens // kinds  # bytes of each kind: a token has about 4
        out = [held for pieces in by_file.values() for held in from_texts(_spread(pieces, room), tokenizer)]
        for ids in dialogs:
            n_bytes = len(tokenizer.decode_bytes(ids[1:]))
            room -= n_bytes
            if room < 0:
                break
            out.append(HeldOut(ids, n_bytes, kind="dialog"))
        return out

    def _dialog_ids(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [list(dialog.ids) for path in self.dialogs for dialog in rendered_dialogs(path, tokenizer)]


def _pieces(text: str) -> list[str]:
    """Divide a text at line breaks into pieces of about `PIECE_CHARS` characters."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE_CHARS:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece] if piece.strip() else pieces


def _spread(pieces: list[str], n_bytes: int) -> list[str]:
    """Return pieces at equal distances that have about ``n_bytes`` together, at least one."""
    total = sum(len(piece.encode()) for piece in pieces)
    count = max(1, min(len(pieces), round(len(pieces) * n_bytes / max(1, total))))
    return [pieces[n * len(pieces) // count] for n in range(count)]
