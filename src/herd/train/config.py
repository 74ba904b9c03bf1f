"""The settings of a training run as one checked record. Does not import torch.

There are two kinds of fields. The fields in `trajectory` determine the numbers of a run, so it is not resumed
with another value of one of them. The others (how rows are divided into forwards, what is saved or logged
when) may change between one start and the next.
"""

from __future__ import annotations

from pydantic import model_validator

from .optimizers import AnyOptimizer
from .schedules import AnySchedule, Cosine
from .section import ComputeDtype, Count, Positive, PositiveReal, Section, impossible


class TrainSettings(Section):
    """The section ``train`` of a recipe: steps, rows, precision, saving and logging."""

    steps: Positive  # optimizer updates
    batch_size: Positive  # rows of one step over all ranks
    context: Positive  # tokens per row
    micro_batch_size: Positive | None = None  # rows of one forward on one rank; None: all rows of the rank
    start_position: Count = 0  # the stream's row that step 0 begins with
    seed: int = 0  # of initial weights and the order of the data (the loop itself draws no random number)

    dtype: ComputeDtype = "fp32"  # of the matmuls (weights and the optimizer's state are always fp32)
    compile: bool = False
    activation_checkpointing: bool = (
        False  # compute a layer's activations again in backward, do not keep them
    )

    save_every: Count = 0  # steps; 0: only when interrupted and at the end
    keep_states: Positive = 2
    eval_every: Count = 0  # steps; 0: never. Otherwise also after the last step
    log_every: Positive = 1
    tensorboard: bool = False
    peak_flops: PositiveReal | None = None  # of one rank's device in FLOP/s, for the log's mfu

    @model_validator(mode="after")
    def _micro_batches_divide_the_batch(self) -> TrainSettings:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise impossible(
                "micro_batch_size",
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}",
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together read in one step."""
        return self.batch_size * self.context

    def rows_of_rank(self, world: int) -> int:
        """Return the rows per step of one of ``world`` ranks.

        Raises ValueError naming numbers that do not divide.
        """
        if self.batch_size % world:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of the {world} ranks")
        rows = self.batch_size // world
        if self.micro_batch_size is not None and rows % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide the {rows} rows of a rank "
                f"(batch_size={self.batch_size} over {world} ranks)"
            )
        return rows


class TrainConfig(TrainSettings):
    """The arguments of `train`: the settings with their optimizer and schedule."""

    optimizer: AnyOptimizer
    schedule: AnySchedule = Cosine()

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainConfig:
        self.schedule.require_steps(self.steps)
        return self

    def learning_rate(self, step: int) -> float:
        """Return the rate of the update after ``step`` updates."""
        return self.schedule.rate(step, self.steps, self.optimizer.lr)

    def trajectory(self) -> dict[str, object]:
        """Return the fields that decide the numbers (up to rounding), as JSON values by dotted name."""
        record: dict[str, object] = {}
        for name, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                record |= {f"{name}.{key}": of for key, of in value.items()}
            elif name in TRAJECTORY:
                record[name] = value
        return record


TRAJECTORY = ("steps", "batch_size", "context", "start_position", "seed", "dtype")
