"""Rows without any text of the user's: repeated passages, and facts with questions about them."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ...data.copying import CopyStream
from ...data.lookup import LEVELS, Level, LookupStream
from ...data.needle import NeedleMaker, RetrievalStream
from ...data.shards import Shards
from ...data.stream import Stream, first_rows
from ...data.text_files import expand_paths
from ...text import Tokenizer
from ..config import TrainSettings
from ..section import Fraction, Positive
from .base import DataSection, OpenedData

PROBE_SEED = 271_828
"""Seed of the fresh rows that accuracy is measured on. Training rows have the run's seed."""


class SyntheticData(DataSection):
    """Rows that are generated, with an accuracy on fresh rows of the same kind as their evaluation."""

    rows = "text"

    @property
    def has_heldout(self) -> bool:
        return True

    @abstractmethod
    def stream(self, tokenizer: Tokenizer, context: int, seed: int) -> Stream:
        """Return the rows of a seed."""

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        fresh = self.stream(tokenizer, settings.context, settings.seed + PROBE_SEED)
        probes = first_rows(fresh, self.heldout_rows, settings.micro_batch_size or 8)
        digest = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        stream = self.stream(tokenizer, settings.context, settings.seed)
        return OpenedData(stream, [], digest, probes={self.kind: probes})


class CopyData(SyntheticData):
    """Rows with one random passage each, repeated to the end of the row (`herd.data.copying`)."""

    kind: Literal["copy"]
    recurring: Fraction = 0.0  # fraction of rows whose passage has recurring tokens, as numbers have

    def stream(self, tokenizer: Tokenizer, context: int, seed: int) -> Stream:
        return CopyStream(tokenizer.n_ordinary, context, seed, recurring=self.recurring)


class LookupData(SyntheticData):
    """Rows of facts and questions about them (`herd.data.lookup`)."""

    kind: Literal["lookup"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1, strict=False)] = LEVELS

    def stream(self, tokenizer: Tokenizer, context: int, seed: int) -> Stream:
        return LookupStream(tokenizer, context, seed, levels=self.levels)


class NeedleData(SyntheticData):
    """Running text from shards with hidden facts, all of them asked for at the end (`herd.data.needle`)."""

    kind: Literal["needles"]
    folder: str  # token shards of the text
    facts: Positive = 4

    def trained_paths(self) -> list[str]:
        return [self.folder]

    def stream(self, tokenizer: Tokenizer, context: int, seed: int) -> Stream:
        shards = Shards.open(expand_paths(self.folder)[0], tokenizer)
        return RetrievalStream(NeedleMaker(tokenizer, shards), context, seed, n_facts=self.facts)
