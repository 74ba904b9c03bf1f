"""Learning-rate schedules, one per file.

A new one is a subclass of `Schedule` and one more name in `AnySchedule`.
"""

from typing import Annotated

from pydantic import Field

from .base import Schedule
from .constant import Constant
from .cosine import Cosine

AnySchedule = Annotated[Cosine | Constant, Field(discriminator="kind")]

__all__ = ["AnySchedule", "Constant", "Cosine", "Schedule"]
