"""An arm of a shrink run, and the recipe that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..llama.config import ModelConfig
from ..train.recipe_yaml import write_yaml
from .cells import ShrinkSettings


@dataclass(frozen=True)
class Arm:
    """A student of the race: its shape, and how its first weights are made.

    ``start`` is "pruned", or a control: "random mask", "uniform depth" or "scratch" (random weights).
    Unless ``distilled``, it is trained on the text alone. ``lr`` defaults to the run's learning rate.
    """

    name: str
    config: ModelConfig
    start: str = "pruned"
    distilled: bool = True
    lr: float | None = None

    def words(self, teacher: ModelConfig) -> str:
        """Return the arm in words, e.g. "the student of 29 layers and a vocabulary of 24,576"."""
        own = self.config
        kept = {
            "n_layers": f"{own.n_layers} layers",
            "dim": f"width {own.dim:,}",
            "ffn_dim": f"{own.ffn_dim:,} FFN neurons",
            "n_heads": f"{own.n_heads} heads",
            "vocab_size": f"a vocabulary of {own.vocab_size:,}",
        }
        smaller = [text for name, text in kept.items() if getattr(own, name) != getattr(teacher, name)]
        if not smaller:
            return "the whole model"
        *first, last = smaller
        shape = f"{', '.join(first)} and {last}" if first else last
        kind = "the student" if self.start == "pruned" else f"the control ({self.start})"
        rate = f" at the learning rate {self.lr:.2g}" if self.lr is not None else ""
        return f"{kind} of {shape}{rate}"


def write_recipe(
    arm: Arm, settings: ShrinkSettings, folder: Path, targets: Path, teacher: str, tokens: int, start: str,
    out: str, lr: float, to: str | None = None,
) -> Path:  # fmt: skip
    """Write the recipe of an arm's training, which `herd train` can repeat, and return its path.

    ``start`` and ``out`` are names in ``folder``, the arm's own. ``teacher`` is the hash of the weights that
    labelled ``targets``. ``to`` is a format that weights are rounded to.
    """
    s, steps = settings, settings.steps(tokens)
    recipe = {
        "name": f"{arm.name}-{out}".replace(" ", "-").replace("run-", ""),
        "model": {"start": str(folder / start)},
        "rounding": None if to is None else {"to": to},
        "data": {"kind": "targets", "folder": str(targets), "teacher": teacher},
        "objective": {"kind": "sampled_distil", "kl_weight": s.kl_weight}
        if arm.distilled
        else {"kind": "lm"},
        "optimizer": {"kind": "adamw", "lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "min_lr_ratio": 0.1, "warmup_steps": max(1, steps // 10)},
        "train": s.train_section(steps) | {"save_every": 50, "seed": s.seed},
        "save_dtype": "fp32",
        "out": str(folder / out),
    }
    path = folder / f"recipe-{out.removeprefix('run-')}.yaml"
    path.write_text(write_yaml(recipe), encoding="utf-8")
    return path
