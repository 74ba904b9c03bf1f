"""What `herd raise` will do, decided beforehand: sizes, steps and an ETA from a probe of this machine.

A plan is a pure function of (mode, seed, measured speeds) and is written to ``run.json`` before anything else, so that
a resumed run never chooses anew. `quick` does not look at the speed at all: tests need the same run everywhere.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..llama.config import ModelConfig, RopeScaling
from ..train.section import ComputeDtype

Mode = Literal["quick", "demo", "full"]
Rung = tuple[int, int]


@dataclass(frozen=True)
class Speeds:
    """What a probe found, in tokens/s of training: each rung in the ``dtype`` that is faster here, and the chosen
    rung's student, taught by it (``distil``) and alone (``control``)."""

    dtype: ComputeDtype
    rungs: dict[Rung, float]
    distil: float
    control: float


class Phase(BaseModel):
    """One call of the loop: how many steps of how many rows of how many tokens, and how fast to learn."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    rows: int
    context: int
    lr: float

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.context


class Plan(BaseModel):
    """The whole life of one herd; saved as ``run.json``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    mode: Mode
    seed: int
    created: str
    version: str
    text: (
        list[str] | None
    )  # the user's corpus; None: the standard library and the project's parallel sentences
    dtype: ComputeDtype  # of the matmuls in training; weights and Adam's state are always fp32
    corpus_bytes: int  # at most this much text is read
    vocab_size: int
    teacher: dict[str, Any]  # fields of ModelConfig
    student: dict[str, Any]
    pretrain: Phase
    extend: list[Phase]
    instruct: Phase
    distil: Phase
    n_dialogs: int
    eval_rows: int  # held-out rows an evaluation during training looks at
    tool_items: int  # held-out dialogs in the final measurement
    needle_items: int  # for each length
    speeds: dict[str, float]  # tokens/s of each probed "dim x layers"; empty where no probe ran
    predicted_seconds: dict[str, float]

    @property
    def teacher_config(self) -> ModelConfig:
        return ModelConfig(**self.teacher)

    @property
    def student_config(self) -> ModelConfig:
        """The student's shape; it takes over the rotary scaling the teacher ended with."""
        return ModelConfig(**self.student)


@dataclass(frozen=True)
class Shares:
    """Seconds a mode gives each part of a life. ``fixed``: what does not depend on the model's size."""

    fixed: dict[str, float]
    pretrain: float
    extend: float
    instruct: float
    distil: float
    instruct_tokens: float  # the tokens instruct tuning needs: the largest model that gets them is chosen

    @property
    def wanted_speed(self) -> float:
        """Tokens/s a rung must train at to be chosen."""
        return self.instruct_tokens / self.instruct


SHARES: dict[str, Shares] = {
    "demo": Shares(
        fixed={"tokenizer": 20, "measure": 40, "report": 3},
        pretrain=75,
        extend=30,
        instruct=110,
        distil=30,
        instruct_tokens=3.5e6,
    ),
    "full": Shares(
        fixed={"tokenizer": 8, "measure": 50, "report": 1},
        pretrain=300,
        extend=120,
        instruct=630,
        distil=130,
        instruct_tokens=10.5e6,
    ),
}


def rung(dim: int, n_layers: int, vocab_size: int, context: int) -> ModelConfig:
    """A toy Llama: head dim 32, two query heads a KV head, FFN about 2.75 dim, tied embeddings as in Llama 3.2."""
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
    """About half the teacher: three quarters of the width of the FFN and the residual stream, and one layer less.

    Heads are cut one from every KV group only where a group has more than two; the rest of attention stays
    (Llama-3.1-Minitron, arXiv 2408.11796).
    """
    return teacher.replace(
        dim=teacher.dim * 3 // 4,
        ffn_dim=teacher.ffn_dim * 5 // 8 // 16 * 16,
        n_layers=max(2, teacher.n_layers - 1),
    )


def extended(config: ModelConfig, context: int) -> ModelConfig:
    """``config`` stretched to ``context`` by Llama 3's frequency scaling, relative to its pre-training context."""
    original = config.rope_scaling.original_context if config.rope_scaling else config.max_context
    return config.replace(
        max_context=context, rope_scaling=RopeScaling(factor=context / original, original_context=original)
    )


def quick_plan(name: str, seed: int, text: list[str] | None) -> Plan:
    """A life of seconds: every stage for real, every model too small to be good."""
    teacher = rung(64, 3, vocab_size=768, context=256)
    return Plan(
        name=name,
        mode="quick",
        seed=seed,
        created=_now(),
        version=__version__,
        text=text,
        dtype="fp32",
        corpus_bytes=400_000,
        vocab_size=768,
        teacher=_fields(teacher),
        student=_fields(student_of(teacher)),
        pretrain=Phase(steps=40, rows=4, context=256, lr=3e-3),
        extend=[Phase(steps=10, rows=2, context=512, lr=1e-3)],
        instruct=Phase(steps=30, rows=4, context=512, lr=3e-3),
        distil=Phase(steps=20, rows=4, context=512, lr=2e-3),
        n_dialogs=400,
        eval_rows=8,
        tool_items=16,
        needle_items=4,
        speeds={},
        predicted_seconds={
            "tokenizer": 5,
            "teacher": 5,
            "long": 4,
            "instruct": 5,
            "student": 4,
            "control": 3,
            "measure": 10,
            "report": 2,
        },
    )


def chosen(rungs: dict[Rung, float], mode: Mode) -> Rung:
    """The largest rung that still sees the tokens instruct tuning needs in its time; else the smallest."""
    return max([r for r in rungs if rungs[r] >= SHARES[mode].wanted_speed] or [min(rungs)])


def timed_plan(
    name: str, mode: Mode, seed: int, text: list[str] | None, vocab_size: int, speeds: Speeds
) -> Plan:
    """The plan that fills its mode's time on a machine of these speeds; every phase gets as many steps as its seconds
    allow."""
    shares, context = SHARES[mode], 256
    dim, n_layers = chosen(speeds.rungs, mode)
    speed = speeds.rungs[dim, n_layers]
    teacher = rung(dim, n_layers, vocab_size, context)
    student = student_of(teacher)
    per_token = teacher.flops_per_token(context / 2, training=True)

    def steps(seconds: float, rows: int, context: int, speed: float) -> int:
        return max(20, round(seconds * speed / (rows * context)))

    # Longer rows pay more attention; the measured ratio at these sizes is close to that of the FLOPs.
    def long_speed(context: int) -> float:
        return speed * per_token / teacher.flops_per_token(context / 2, training=True)

    extend = [
        Phase(steps=steps(shares.extend / 2, 4096 // c, c, long_speed(c)), rows=4096 // c, context=c, lr=1e-3)
        for c in (2 * context, 4 * context)
    ]
    pretrain = Phase(steps=steps(shares.pretrain, 8, context, speed), rows=8, context=context, lr=3e-3)
    instruct_steps = steps(shares.instruct, 4, 2 * context, long_speed(2 * context))
    instruct = Phase(steps=instruct_steps, rows=4, context=2 * context, lr=2e-3)
    distil = Phase(
        steps=steps(shares.distil, 4, 2 * context, speeds.distil), rows=4, context=2 * context, lr=2e-3
    )
    full = mode == "full"
    return Plan(
        name=name,
        mode=mode,
        seed=seed,
        created=_now(),
        version=__version__,
        text=text,
        dtype=speeds.dtype,
        corpus_bytes=24_000_000 if full else 8_000_000,
        vocab_size=vocab_size,
        teacher=_fields(teacher),
        student=_fields(student),
        pretrain=pretrain,
        extend=extend,
        instruct=instruct,
        distil=distil,
        n_dialogs=70_000 if full else 20_000,
        eval_rows=64 if full else 32,
        tool_items=400 if full else 160,
        needle_items=40 if full else 16,
        speeds={f"{d}x{n}": round(s) for (d, n), s in speeds.rungs.items()},
        predicted_seconds={
            "tokenizer": shares.fixed["tokenizer"],
            "teacher": shares.pretrain,
            "long": shares.extend,
            "instruct": shares.instruct,
            "student": shares.distil,
            "control": shares.distil * speeds.distil / speeds.control,
            "measure": shares.fixed["measure"],
            "report": shares.fixed["report"],
        },
    )


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rope_scaling"}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
