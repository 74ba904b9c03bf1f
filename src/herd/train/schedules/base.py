"""The frame of every schedule: a linear warm-up, a stretch that subclasses shape, and a linear decay to zero.

Llama 3 405B: 8,000 warm-up steps to 8e-5, cosine to 8e-7 over 1,200,000 steps, then linear decay to zero,
with the weights of that last stretch averaged (arXiv 2407.21783, sections 3.4.1 and 3.4.3).
"""

from __future__ import annotations

from abc import abstractmethod

from pydantic import model_validator

from ..section import Count, Section, impossible


class Schedule(Section):
    """A learning rate that depends only on the step."""

    warmup_steps: Count = 0
    decay_steps: Count = 0  # the last steps, linearly to zero
    average_every: Count = 0  # steps of the decay between weights that enter the resulting mean; 0: no mean

    @model_validator(mode="after")
    def _averages_within_the_decay(self) -> Schedule:
        if self.average_every and not self.decay_steps:
            raise impossible(
                "average_every", "average_every needs decay_steps: only weights of the decay are averaged"
            )
        if self.average_every > self.decay_steps:
            raise impossible(
                "average_every", f"average_every={self.average_every} exceeds decay_steps={self.decay_steps}"
            )
        return self

    def require_steps(self, steps: int) -> None:
        """Raise `RecipeError` if warm-up and decay together take more than ``steps`` steps."""
        if self.warmup_steps + self.decay_steps > steps:
            longer = "decay_steps" if self.decay_steps > self.warmup_steps else "warmup_steps"
            raise impossible(
                f"schedule.{longer}",
                f"warmup_steps={self.warmup_steps} + decay_steps={self.decay_steps} exceed steps={steps}",
            )

    def rate(self, step: int, steps: int, peak: float) -> float:
        """Return the rate of the update after ``step`` of ``steps`` updates.

        Warm-up ends exactly at the peak. The decay begins where the middle ended and would reach zero at
        ``steps``.
        """
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        length = steps - self.decay_steps - self.warmup_steps
        done = min(step, steps - self.decay_steps) - self.warmup_steps
        rate = self.middle(done / length, peak) if length else peak
        return rate if step < steps - self.decay_steps else rate * (steps - step) / self.decay_steps

    @abstractmethod
    def middle(self, done: float, peak: float) -> float:
        """Return the rate after the fraction ``done`` (0 to 1) of the steps between warm-up and decay."""

    def averages_at(self, step: int, steps: int) -> bool:
        """Return whether the weights after ``step`` updates enter the mean.

        Steps are counted back from the last one, within the decay.
        """
        in_decay = step > steps - self.decay_steps
        return bool(self.average_every) and in_decay and (steps - step) % self.average_every == 0
