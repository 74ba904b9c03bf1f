"""Everything that decides a training run, as one checked record; without torch.

Fields fall into two kinds. Those in `TRAJECTORY` decide which numbers come out: a run resumed with one of them changed
would be another run, so that is refused. The others (how rows are cut into forwards, what is saved or logged when) may
change between one start and the next.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..dtypes import parse_dtype
from ..errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _short_name(value: Any) -> Any:
    """Return the short name of a number format; what is not one is left to the check that follows."""
    try:
        return parse_dtype(value)
    except (ConfigError, AttributeError):
        return value


ComputeDtype = Annotated[Literal["fp32", "bf16"], BeforeValidator(_short_name)]
"""What matmuls run in; torch's long names are accepted too."""


def impossible(field: str, message: str) -> PydanticCustomError:
    """An error of several fields together, pinned to the one the user should look at."""
    return PydanticCustomError("impossible", "{reason}", {"field": field, "reason": message})


class TrainConfig(BaseModel):
    """How to train, in optimizer steps and rows. ``batch_size`` is the global batch of one step over all ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    steps: Positive
    batch_size: Positive
    context: Positive  # tokens a row
    micro_batch_size: Positive | None = (
        None  # rows of one forward on one rank; None: all rows of the rank at once
    )
    start_position: Count = 0  # the stream's row that step 0 begins with
    seed: int = 0  # for who builds the model and the stream; the loop itself draws no random number

    lr: PositiveReal  # peak
    min_lr_ratio: Fraction = 0.1  # where the cosine ends, as a part of the peak
    warmup_steps: Count = 0
    decay_steps: Count = 0  # the last steps: linear to zero
    average_every: Count = (
        0  # every this many steps of the decay the weights enter the mean that is the result; 0: never
    )

    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    eps: PositiveReal = 1e-8
    clip: PositiveReal | None = 1.0  # of the global gradient norm

    dtype: ComputeDtype = "fp32"  # of the matmuls; weights and Adam's state are always fp32
    compile: bool = False
    activation_checkpointing: bool = (
        False  # recompute a block's activations in backward instead of keeping them
    )

    save_every: Count = 0  # steps; 0: when interrupted and at the end only
    keep_states: Positive = 2
    eval_every: Count = 0  # steps; 0: never. With it, also after the last step
    log_every: Positive = 1
    tensorboard: bool = False
    peak_flops: PositiveReal | None = None  # of one rank's device in FLOP/s; given, the log has mfu

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.warmup_steps + self.decay_steps > self.steps:
            field = "decay_steps" if self.decay_steps > self.warmup_steps else "warmup_steps"
            raise impossible(
                field,
                f"warmup_steps={self.warmup_steps} + decay_steps={self.decay_steps} are more than steps={self.steps}",
            )
        if self.average_every and not self.decay_steps:
            raise impossible(
                "average_every", "average_every needs decay_steps: only weights of the decay are averaged"
            )
        if self.average_every > max(self.decay_steps, 1):
            raise impossible(
                "average_every",
                f"average_every={self.average_every} exceeds decay_steps={self.decay_steps}",
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise impossible(
                "micro_batch_size",
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}",
            )
        for name, beta in zip(("first", "second"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise impossible("betas", f"the {name} of betas={list(self.betas)} must be in [0, 1)")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens all ranks together read in one step."""
        return self.batch_size * self.context

    def rows_of_rank(self, world: int) -> int:
        """Rows one of ``world`` ranks reads in a step. Raises ValueError naming the numbers that do not divide."""
        if self.batch_size % world:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of the {world} ranks")
        rows = self.batch_size // world
        if self.micro_batch_size is not None and rows % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide the {rows} rows of a rank "
                f"(batch_size={self.batch_size} over {world} ranks)"
            )
        return rows

    def trajectory(self) -> dict[str, object]:
        """The fields that decide the resulting numbers, as JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k in TRAJECTORY}


TRAJECTORY = frozenset(TrainConfig.model_fields) - {
    "micro_batch_size",
    "compile",
    "activation_checkpointing",
    "save_every",
    "keep_states",
    "eval_every",
    "log_every",
    "tensorboard",
    "peak_flops",
}
"""The fields that decide the resulting numbers (up to rounding, which `micro_batch_size` and `compile` change)."""
