"""Generated dialogs whose answers and tool calls are correct by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ...data.dialogs import make_dialogs
from ...data.read_dialogs import rendered_dialogs
from ...data.wordings import LANGUAGES
from ...text import Rendered, Tokenizer, render
from ...text.llama3_chat import TOOL_CALL_FORMATS
from ..config import TrainSettings
from ..section import Positive
from .base import DataSection, OpenedData


class MadeDialogData(DataSection):
    """``count`` generated dialogs. Others are generated for evaluation, unless ``heldout`` names a file."""

    kind: Literal["made_dialogs"]
    count: Positive
    languages: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = (
        LANGUAGES  # name one twice to double it
    )
    tool_call_formats: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = TOOL_CALL_FORMATS
    rows = "dialogs"

    @property
    def has_heldout(self) -> bool:
        return True

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        tokenizer.require_chat()

        def made(split: str, count: int) -> list[Rendered]:
            return [
                render(d.messages, tokenizer, tool_call_format=d.tool_call_format)
                for d in make_dialogs(
                    count,
                    settings.seed,
                    split=split,
                    languages=self.languages,
                    tool_call_formats=self.tool_call_formats,
                )
            ]

        if self.heldout is None:
            heldout = made("test", min(self.count, 4 * self.heldout_rows))
        else:
            heldout = list(rendered_dialogs(self.heldout, tokenizer))
        return self.pack(made("train", self.count), heldout, tokenizer, settings)
