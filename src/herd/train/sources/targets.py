"""A teacher's stored targets, with the rows that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...data.targets import Targets, TargetStream
from ...data.text_files import expand_paths
from ...errors import DataError
from ...text import Tokenizer
from ..config import TrainSettings
from .base import DataSection, OpenedData


class TargetData(DataSection):
    """A folder of targets. ``teacher`` is the hash of the teacher that must have made them."""

    kind: Literal["targets"]
    folder: str
    teacher: str | None = None
    rows = "targets"

    def trained_paths(self) -> list[str]:
        return [self.folder]

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        targets = Targets(expand_paths(self.folder)[0])
        targets.require_tokenizer(tokenizer.sha256)
        if self.teacher is not None and targets.spec.teacher != self.teacher:
            raise DataError(
                f"{targets.folder}: was labelled by the teacher of hash {targets.spec.teacher[:12]}, not by "
                f"{self.teacher[:12]}: label with that teacher into another folder"
            )
        if targets.spec.context != settings.context:
            raise DataError(
                f"{targets.folder}: its rows have {targets.spec.context} tokens; set train.context to that"
            )
        rows = self.heldout_shards(tokenizer, settings)
        return OpenedData(TargetStream(targets, settings.seed), rows, targets.sha256)
