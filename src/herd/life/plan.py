"""The plan of `herd raise`: sizes, steps and predicted times, chosen after a speed test of this machine.

A plan depends only on the mode, the seed, the text's name and the measured speeds. It is written to
``run.json`` before anything else, so a resumed run keeps its sizes. The mode `quick` does not depend on
speed, because tests need the same run everywhere.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..llama.config import ModelConfig, RopeScaling
from ..train.section import ComputeDtype

Mode = Literal["quick", "demo", "full"]
Rung = tuple[int, int]
"""(dim, layers) of a model size."""
CONTEXT = 256
"""Context of pre-training in tokens."""


@dataclass(frozen=True)
class Speeds:
    """Measured training speeds in tokens per second.

    ``rungs``: the speed of each size in ``dtype``, the faster dtype on this machine. ``distil`` and
    ``control``: the student of the chosen size, with and without its teacher.
    """

    dtype: ComputeDtype
    rungs: dict[Rung, float]
    distil: float
    control: float


class Phase(BaseModel):
    """Settings of one call of the training loop: steps, rows per step, tokens per row, learning rate."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    rows: int
    context: int
    lr: float

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.context


class Plan(BaseModel):
    """All settings of one run, stored as ``run.json``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    mode: Mode
    seed: int
    created: str
    version: str
    text: list[str] | None  # the user's text; None: the built-in corpus
    dtype: ComputeDtype  # of the matmuls in training (weights and Adam's state are always fp32)
    corpus_bytes: int  # text is read up to this limit
    vocab_size: int
    teacher: dict[str, Any]  # fields of ModelConfig
    student: dict[str, Any]
    pretrain: Phase
    extend: list[Phase]
    instruct: Phase
    distil: Phase
    n_dialogs: int
    eval_rows: int  # held-out rows for evaluations during training
    tool_items: int  # held-out dialogs in the final evaluation
    needle_items: int  # for each length
    speeds: dict[str, float]  # tokens/s of each measured "dim x layers"; empty if nothing was measured
    predicted_seconds: dict[str, float]

    @property
    def teacher_config(self) -> ModelConfig:
        return ModelConfig(**self.teacher)

    @property
    def student_config(self) -> ModelConfig:
        """The student's shape, with the rotary scaling that the teacher has at the end."""
        return ModelConfig(**self.student)


@dataclass(frozen=True)
class TimedMode:
    """A mode that fills a given time: seconds per stage, tokens needed for instruct tuning, other sizes."""

    seconds: dict[str, float]
    instruct_tokens: float
    amounts: dict[str, int]

    @property
    def wanted_speed(self) -> float:
        """Tokens per second that a size must reach to be chosen."""
        return self.instruct_tokens / self.seconds["instruct"]


_MODES = yaml.safe_load(Path(__file__).with_name("modes.yaml").read_text(encoding="utf-8"))
TIMED_MODES = {name: TimedMode(**values) for name, values in _MODES["timed"].items()}


def rung(dim: int, n_layers: int, vocab_size: int, context: int) -> ModelConfig:
    """Return a toy Llama: head dim 32, two query heads per KV head, FFN of 2.75 dim, tied embeddings."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=dim // 32,
        n_kv_heads=dim // 64,
        ffn_dim=-(-dim * 11 // 4 // 32) * 32,
        rope_theta=10_000.0,
        tie_embeddings=True,
        max_context=context,
    )


def student_of(teacher: ModelConfig) -> ModelConfig:
    """Return a shape of half the teacher's size: 3/4 of the width, 5/8 of the FFN, one layer less.

    All attention heads are kept, because pruning removes heads only from KV groups of more than two
    (Llama-3.1-Minitron, arXiv 2408.11796).
    """
    return teacher.replace(
        dim=teacher.dim * 3 // 4,
        ffn_dim=teacher.ffn_dim * 5 // 8 // 16 * 16,
        n_layers=max(2, teacher.n_layers - 1),
    )


def extended(config: ModelConfig, context: int) -> ModelConfig:
    """Return ``config`` with Llama 3's frequency scaling from the pre-training context to ``context``."""
    original = config.rope_scaling.original_context if config.rope_scaling else config.max_context
    scaling = RopeScaling(factor=context / original, original_context=original)
    return config.replace(max_context=context, rope_scaling=scaling)


def quick_plan(name: str, seed: int, text: list[str] | None) -> Plan:
    """Return the plan of the mode `quick`. It is the same on every machine."""
    sizes = dict(_MODES["quick"])
    dim, n_layers = sizes.pop("rung")
    teacher = rung(dim, n_layers, sizes.pop("vocab_size"), CONTEXT)
    amounts = sizes.pop("amounts")
    return _plan(name, "quick", seed, text, teacher, dtype="fp32", speeds={}, **amounts, **sizes)


def chosen(rungs: dict[Rung, float], mode: Mode) -> Rung:
    """Return the largest size that is fast enough for its tokens of instruct tuning, or else the smallest."""
    return max([size for size in rungs if rungs[size] >= TIMED_MODES[mode].wanted_speed] or [min(rungs)])


def timed_plan(
    name: str, mode: Mode, seed: int, text: list[str] | None, vocab_size: int, speeds: Speeds
) -> Plan:
    """Return the plan that fills the mode's time on a machine with these speeds."""
    timed = TIMED_MODES[mode]
    size = chosen(speeds.rungs, mode)
    teacher = rung(*size, vocab_size, CONTEXT)

    def phase(seconds: float, rows: int, context: int, speed: float, lr: float) -> Phase:
        return Phase(
            steps=max(20, round(seconds * speed / (rows * context))), rows=rows, context=context, lr=lr
        )

    def speed_at(context: int) -> float:
        # Attention costs more in longer rows; at these sizes the measured ratio is close to the ratio of
        # FLOPs.
        per_token = teacher.flops_per_token(CONTEXT / 2, training=True)
        return speeds.rungs[size] * per_token / teacher.flops_per_token(context / 2, training=True)

    seconds, double = dict(timed.seconds), 2 * CONTEXT
    half = seconds["long"] / 2
    seconds["control"] = seconds["student"] * speeds.distil / speeds.control
    return _plan(
        name,
        mode,
        seed,
        text,
        teacher,
        dtype=speeds.dtype,
        speeds={f"{dim}x{n_layers}": round(speed) for (dim, n_layers), speed in speeds.rungs.items()},
        predicted_seconds=seconds,
        pretrain=phase(seconds["teacher"], 8, CONTEXT, speeds.rungs[size], 3e-3),
        extend=[phase(half, 4096 // c, c, speed_at(c), 1e-3) for c in (double, 4 * CONTEXT)],
        instruct=phase(seconds["instruct"], 4, double, speed_at(double), 2e-3),
        distil=phase(seconds["student"], 4, double, speeds.distil, 2e-3),
        **timed.amounts,
    )


def _plan(
    name: str, mode: Mode, seed: int, text: list[str] | None, teacher: ModelConfig, **sizes: Any
) -> Plan:
    def fields(config: ModelConfig) -> dict[str, Any]:
        return {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rope_scaling"}

    return Plan(
        name=name,
        mode=mode,
        seed=seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=__version__,
        text=text,
        vocab_size=teacher.vocab_size,
        teacher=fields(teacher),
        student=fields(student_of(teacher)),
        **sizes,
    )
