"""Everything that decides a training run, as one checked record; without torch.

Fields fall into two kinds. Those in `TRAJECTORY` decide which numbers come out: a run resumed with one of them changed
would be another run, so that is refused. The others (how rows are cut into forwards, what is saved or logged when) may
change between one start and the next.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def impossible(field: str, message: str) -> PydanticCustomError:
    """An error of several fields together, pinned to the one the user should look at."""
    return PydanticCustomError("impossible", "{reason}", {"field": field, "reason": message})


class TrainConfig(BaseModel):
    """How to train, in optimizer steps and rows. ``batch_rows`` is the global batch of one step over all ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    steps: Positive
    batch_rows: Positive
    context: Positive  # tokens a row
    micro_rows: Positive | None = None  # rows of one forward on one rank; None: all rows of the rank at once
    start_position: Count = 0  # the stream's row that step 0 begins with
    seed: int = 0  # for who builds the model and the stream; the loop itself draws no random number

    lr: PositiveReal  # peak
    min_lr_ratio: Fraction = 0.1  # where the cosine ends, as a part of the peak
    warmup_steps: Count = 0
    anneal_steps: Count = 0  # the last steps: linear to zero
    average_every: Count = (
        0  # every so many steps of annealing the weights enter the mean that is the result; 0: never
    )

    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    eps: PositiveReal = 1e-8
    clip: PositiveReal | None = 1.0  # of the global gradient norm

    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the matmuls; weights and Adam's state are always fp32
    )
    compile: bool = False
    remat: bool = False  # recompute a block's activations in backward instead of keeping them

    save_every: Count = 0  # steps; 0: when interrupted and at the end only
    keep_states: Positive = 2
    eval_every: Count = 0  # steps; 0: never. With it, also after the last step
    log_every: Positive = 1
    tensorboard: bool = False
    peak_flops: PositiveReal | None = None  # of one rank's device in FLOP/s; given, the log has mfu

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.warmup_steps + self.anneal_steps > self.steps:
            field = "anneal_steps" if self.anneal_steps > self.warmup_steps else "warmup_steps"
            raise impossible(
                field,
                f"warmup_steps={self.warmup_steps} + anneal_steps={self.anneal_steps} are more than steps={self.steps}",
            )
        if self.average_every and not self.anneal_steps:
            raise impossible(
                "average_every", "average_every needs anneal_steps: only annealed weights are averaged"
            )
        if self.average_every > max(self.anneal_steps, 1):
            raise impossible(
                "average_every",
                f"average_every={self.average_every} exceeds anneal_steps={self.anneal_steps}",
            )
        if self.micro_rows is not None and self.batch_rows % self.micro_rows:
            raise impossible(
                "micro_rows", f"micro_rows={self.micro_rows} does not divide batch_rows={self.batch_rows}"
            )
        for name, beta in zip(("first", "second"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise impossible("betas", f"the {name} of betas={list(self.betas)} must be in [0, 1)")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens all ranks together read in one step."""
        return self.batch_rows * self.context

    def rows_of_rank(self, world: int) -> int:
        """Rows one of ``world`` ranks reads in a step. Raises ValueError naming the numbers that do not divide."""
        if self.batch_rows % world:
            raise ValueError(f"batch_rows={self.batch_rows} is not a multiple of the {world} ranks")
        rows = self.batch_rows // world
        if self.micro_rows is not None and rows % self.micro_rows:
            raise ValueError(
                f"micro_rows={self.micro_rows} does not divide the {rows} rows of a rank "
                f"(batch_rows={self.batch_rows} over {world} ranks)"
            )
        return rows

    def trajectory(self) -> dict[str, object]:
        """The fields that decide the resulting numbers, as JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k in TRAJECTORY}


TRAJECTORY = frozenset(TrainConfig.model_fields) - {
    "micro_rows",
    "compile",
    "remat",
    "save_every",
    "keep_states",
    "eval_every",
    "log_every",
    "tensorboard",
    "peak_flops",
}
"""The fields that decide the resulting numbers (up to rounding, which `micro_rows` and `compile` change)."""
