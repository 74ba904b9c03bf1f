"""Token shards that were written before."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...data.shards import Shards
from ...data.stream import TokenStream
from ...data.text_files import expand_paths
from ...text import Tokenizer
from ..config import TrainSettings
from .base import DataSection, OpenedData


class ShardData(DataSection):
    """A folder of token shards."""

    kind: Literal["shards"]
    folder: str
    documents: bool = False  # attention stays within a document
    rows = "text"

    def trained_paths(self) -> list[str]:
        return [self.folder]

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        shards = Shards.open(expand_paths(self.folder)[0], tokenizer)
        stream = TokenStream(shards, settings.context, settings.seed, documents=self.documents)
        return OpenedData(stream, self.heldout_shards(tokenizer, settings), str(shards.index["sha256"]))
