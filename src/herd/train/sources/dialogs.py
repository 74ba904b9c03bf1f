"""Dialogs in a file of any of the common formats."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...data.read_dialogs import rendered_dialogs
from ...text import Tokenizer
from ..config import TrainSettings
from .base import DataSection, OpenedData


class DialogData(DataSection):
    """A file of dialogs, e.g. JSON lines of ``{"messages": [...], "tools": [...]}``."""

    kind: Literal["dialogs"]
    path: str
    rows = "dialogs"

    def trained_paths(self) -> list[str]:
        return [self.path]

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        dialogs, heldout = (
            [] if path is None else list(rendered_dialogs(path, tokenizer))
            for path in (self.path, self.heldout)
        )
        return self.pack(dialogs, heldout, tokenizer, settings)
