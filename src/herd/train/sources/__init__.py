"""The sources of training data, one per file: a section ``data`` of a recipe and the code that opens it.

A new source is a subclass of `DataSection` and one more name in `Single`, or in `AnyData` if it
cannot be a part of a mixture.
"""

from typing import Annotated

from pydantic import Field

from .base import OpenedData, warn_of_repeats
from .mix import MixData, Single
from .targets import TargetData
from .tuning import PreferenceData, TuningData

AnyData = Annotated[Single | MixData | TargetData | TuningData | PreferenceData, Field(discriminator="kind")]

__all__ = ["AnyData", "OpenedData", "PreferenceData", "TuningData", "warn_of_repeats"]
