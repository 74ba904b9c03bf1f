"""What a run reads, one source per file: the section ``data`` of a recipe and how it is opened.

A new source is a subclass of `DataSection` and one more name in `AnyData`.
"""

from typing import Annotated

from pydantic import Field

from .base import DataSection, OpenedData
from .dialogs import DialogData
from .made_dialogs import MadeDialogData
from .shards import ShardData
from .text import TextData

AnyData = Annotated[TextData | ShardData | DialogData | MadeDialogData, Field(discriminator="kind")]

__all__ = ["AnyData", "DataSection", "MadeDialogData", "OpenedData", "TextData"]
