"""Load published runs (``published_runs.yaml``), to check the planner with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from herd.llama.config import SIZES, ModelConfig
from herd.plan.layout import Job, ParallelLayout
from herd.plan.leak import LLAMA2
from herd.plan.ops import BF16, Weights

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_MODELS = {f"Llama 2 {size}": config for size, config in LLAMA2.items()}
_MODELS |= {f"Llama 3.1 {size}": config for size, config in SIZES.items()}
# int4: 4 bits, and a bf16 scale and zero point for every 32 weights
_WEIGHTS = {"bf16": BF16, "int8": Weights(1.0, 1.0), "int4": Weights(0.625, 0.625)}

DAYS, UNEXPECTED, PLANNED = (_DATA["interruptions"][name] for name in ("days", "unexpected", "planned"))
"""Days that Meta watched on 16,384 GPUs, and the interruptions in them; "higher than 90 % effective training
time"."""


@dataclass(frozen=True)
class MetaRow:
    """One row of the paper's table 4: 405B on ``devices`` H100s with the published MFU."""

    devices: int
    layout: ParallelLayout
    job: Job
    mfu: float


@dataclass(frozen=True)
class TitanRow:
    """One published run of torchtitan with its tokens per second and GPU."""

    name: str
    size: str
    machine: str
    layout: ParallelLayout
    job: Job
    tokens_per_s: float
    compiled: bool


@dataclass(frozen=True)
class FastRow:
    """One published decode rate of gpt-fast: tokens per second of one sequence."""

    name: str
    config: ModelConfig
    machine: str
    tp: int
    weights: Weights
    tokens_per_s: float
    context: int = 105  # the mean of a prompt of 5 tokens and 200 new ones


def _job(size: str, batch: int, context: int) -> Job:
    config = SIZES[size]
    return Job(config.replace(max_context=max(config.max_context, context)), batch, context)


META = [
    MetaRow(
        row["devices"],
        ParallelLayout(**row["layout"]),
        _job("405B", row["batch"], row["context"]),
        row["mfu"],
    )
    for row in _DATA["meta"]
]
TITAN = [
    TitanRow(
        row["name"],
        row["size"],
        row["machine"],
        ParallelLayout(**row["layout"]),
        _job(row["size"], row["batch"], row["context"]),
        row["tokens_per_s"],
        row.get("compiled", True),
    )
    for row in _DATA["torchtitan"]
]
GPT_FAST = [
    FastRow(
        row["name"],
        _MODELS[row["model"]],
        row["machine"],
        row["tp"],
        _WEIGHTS[row["weights"]],
        row["tokens_per_s"],
    )
    for row in _DATA["gpt_fast"]
]
