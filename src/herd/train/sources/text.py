"""Running text: files and folders, which are divided, deduplicated and written as token shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...data.corpus import Corpus, corpus_origin, load_corpus
from ...data.shards import Shards
from ...data.stream import TokenStream
from ...data.text_files import expand_paths
from ...text import Tokenizer
from ..config import TrainSettings
from ..section import Positive
from .base import DataSection, OpenedData, source_file


class TextData(DataSection):
    """Text to make shards of.

    A part of it is held out for evaluation unless ``heldout`` names other shards.
    """

    kind: Literal["text"]
    # files, folders, patterns, hf:NAME; [builtin]: Python's own
    paths: Annotated[list[str], Field(min_length=1)]
    split: Literal["teacher", "student"] = "teacher"  # which part (the other one is for another model)
    max_bytes: Positive | None = None
    documents: bool = False  # attention stays within a document
    rows = "text"

    @property
    def has_text(self) -> bool:
        return True

    @property
    def has_heldout(self) -> bool:
        return True

    def trained_paths(self) -> list[str]:
        return [path for path in self._corpus_spec() or [] if not path.startswith("hf:")]

    def origin(self) -> tuple[list[tuple[str, Path]], dict[str, Any]]:
        files, settings = corpus_origin(self._corpus_spec())
        if self.heldout is not None:
            files += [source_file(path) for path in expand_paths(self.heldout)]
        own = self.model_dump(mode="json", include={"split", "max_bytes", "documents"})
        return files, settings | {f"data.{name}": value for name, value in own.items()}

    def texts(self) -> Iterator[str]:
        return (document.text for document in self._corpus().splits[self.split])

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        shards = self._shards(self.split, tokenizer, out)
        rows = self.heldout_shards(tokenizer, settings)
        if self.heldout is None:
            other = self._shards("heldout", tokenizer, out)
            rows = self.first_rows(TokenStream(other, settings.context, 0), settings)
        stream = TokenStream(shards, settings.context, settings.seed, documents=self.documents)
        return OpenedData(stream, rows, str(shards.index["sha256"]))

    def _shards(self, split: str, tokenizer: Tokenizer, out: Path) -> Shards:
        folder = out / "shards" / split
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            Shards.write(folder, self._corpus().splits[split], tokenizer)
        return Shards.open(folder, tokenizer)

    def _corpus(self) -> Corpus:
        return load_corpus(self._corpus_spec(), max_bytes=self.max_bytes)

    def _corpus_spec(self) -> list[str] | None:
        return None if self.paths == ["builtin"] else self.paths
