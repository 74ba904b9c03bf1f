"""The objectives of training, one per file: its function and its section of a recipe.

A new objective is a function (hidden states, head, batch) -> `Loss`, a subclass of `ObjectiveSection` that
builds it, and one more name in `AnyObjective`.
"""

from typing import Annotated

from pydantic import Field

from .base import Loss, Objective, batch_loss, signature
from .distil import DistilSection, SampledDistilSection, distil, sampled_distil
from .dpo import DpoSection, dpo
from .lm import LmSection, lm
from .sft import SftSection, sft

AnyObjective = Annotated[
    LmSection | SftSection | DistilSection | SampledDistilSection | DpoSection, Field(discriminator="kind")
]

__all__ = [
    "AnyObjective", "Loss", "Objective", "batch_loss", "distil", "dpo", "lm", "sampled_distil", "sft",
    "signature",
]  # fmt: skip
