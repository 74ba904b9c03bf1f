"""The plan of `herd raise`: the sizes and stages of a mode, the same on every machine.

A plan is written to ``run.json`` before anything else, so a resumed run keeps it. The machine decides only
the dtype of the matmuls and the predicted times. The modes are in ``modes.yaml``.
"""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..llama.config import ModelConfig
from ..package_yaml import package_yaml
from ..train.section import ComputeDtype

Mode = Literal["quick", "demo", "full"]
CONTEXT = 256
"""Context of pre-training in tokens, which Llama 3's rotary scaling starts from."""


class Phase(BaseModel):
    """One recipe of a stage: its steps, rows, context, peak rate and sources of data.

    ``mix`` is a recipe's ``data.mix``. Its paths are relative to the run's folder.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""  # of the recipe's folder below the stage's; "": the stage's own folder
    steps: int
    rows: int
    context: int
    lr: float
    schedule: Literal["cosine", "constant"] = "cosine"  # constant: without the decay at the end
    mix: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.context


class TrainingStage(BaseModel):
    """A stage that makes the model ``name`` from the model ``start`` by a series of recipes."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    start: str | None = None  # None: random weights
    objective: Literal["lm", "sft", "distil"] = "lm"
    prompts: Literal["text", "chat"] = "text"  # what live samples continue
    phases: list[Phase]


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
    training: list[TrainingStage]
    tool_items: int  # held-out dialogs in the final evaluation
    needle_items: int  # for each length
    speeds: dict[str, float]  # tokens/s of this machine by dtype (empty if nothing was measured)
    predicted_seconds: dict[str, float]

    @property
    def teacher_config(self) -> ModelConfig:
        return ModelConfig(**self.teacher)

    @property
    def student_config(self) -> ModelConfig:
        return ModelConfig(**self.student)

    def stage(self, name: str) -> TrainingStage:
        """Return the training stage of a name."""
        return next(stage for stage in self.training if stage.name == name)


_MODES = package_yaml(__package__, "modes.yaml")


def toy_config(dim: int, n_layers: int, vocab_size: int) -> ModelConfig:
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
        max_context=CONTEXT,
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


def make_plan(name: str, mode: Mode, seed: int, text: list[str] | None) -> Plan:
    """Return the plan of a mode, in fp32 and without predictions."""
    settings = dict(_MODES[mode])
    dim, n_layers = settings.pop("shape")
    teacher = toy_config(dim, n_layers, settings["vocab_size"])

    def fields(config: ModelConfig) -> dict[str, Any]:
        return {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rope_scaling"}

    return Plan(
        name=name,
        mode=mode,
        seed=seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=__version__,
        text=text,
        dtype="fp32",
        teacher=fields(teacher),
        student=fields(student_of(teacher)),
        speeds={},
        predicted_seconds={},
        **settings,
    )
