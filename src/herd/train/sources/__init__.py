"""What a run reads, one source per file: the section ``data`` of a recipe and how it is opened.

A new source is a subclass of `DataSection` and one more name in `Single`.
"""

from typing import Annotated

from pydantic import Field

from .base import DataSection, OpenedData, warn_of_repeats
from .made_dialogs import MadeDialogData
from .mix import MixData, Single
from .text import TextData

AnyData = Annotated[Single | MixData, Field(discriminator="kind")]

__all__ = ["AnyData", "DataSection", "MadeDialogData", "MixData", "OpenedData", "TextData", "warn_of_repeats"]
