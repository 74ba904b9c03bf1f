"""Putting what was measured beside what would have been predicted, wherever something is measured anyway.

`herd bench` and `herd raise` hand their results here. What comes back stands in their own output; what is
kept is the history that `score` learns from. Predictions are made without what was learned before, so that a
factor is never learned twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from ..quant.formats import Scheme
from ..train.config import TrainSettings
from . import profile as profiles
from .layout import Job, ParallelLayout
from .quantizing import SHORT, quantize_seconds
from .score import Event, record
from .step import predict
from .ways import GGUF_FORMS, Here


def bench(config: ModelConfig, blocks: str, rows: Iterable[MutableMapping[str, Any]], what: str) -> None:
    """Adds ``predicted_seconds`` to the rows of `herd bench` and keeps both, where this machine has a profile
    and the weights (``blocks``: GGUF's name of their format) are of a form that is planned for."""
    profile = profiles.load()
    form = next((form for form in GGUF_FORMS if form.name == SHORT.get(blocks, blocks.lower())), None)
    if profile is None or form is None or form.dtype not in profile.gemm:
        return
    here, found = Here(profile, 0.0), list(rows)
    kv = next((row["kv"] for row in found if "kv" in row), "bf16")
    if kv not in BYTES:
        return
    for row in found:
        if row["work"] == "decode":
            row["predicted_seconds"] = here.decode(config, form, kv, row["tokens"], row["batch"])
        else:
            row["predicted_seconds"] = here.prefill(config, form, kv, row["tokens"]) * row["batch"]
        record(
            Event(
                row["work"],
                f"{what}, {row['name']}",
                "s",
                row["predicted_seconds"],
                row["seconds"],
                profile.key,
            )
        )


def training(
    config: ModelConfig, train: TrainSettings, seconds: float, steps: int, what: str
) -> float | None:
    """What ``steps`` steps on this machine alone would have been said to take; kept beside the ``seconds``
    they took. None without a profile, and where an accelerator did the work."""
    profile = profiles.load()
    if profile is None or profile.gpus or seconds <= 0 or steps < 1:
        return None
    micro = train.micro_batch_size or train.batch_size
    layout = ParallelLayout(
        micro=micro,
        recompute="full" if train.activation_checkpointing else "none",
        precision=train.dtype,
    )
    predicted = (
        steps * predict(Job(config, train.batch_size, train.context), layout, profile.machine()).seconds
    )
    record(Event("train", what, "s", predicted, seconds, profile.key))
    return predicted


def quantizing(
    config: ModelConfig, plan: Scheme, source_bytes: float, seconds: float, what: str
) -> float | None:
    """The same of `herd quantize`: weights of ``source_bytes`` a parameter rounded to blocks."""
    profile = profiles.load()
    known = {} if profile is None else profile.encode
    if profile is None or any(SHORT.get(f.name) not in known for f in plan.plan(config).values() if f.packed):
        return None
    predicted = quantize_seconds(profile, config, plan, source_bytes)
    record(Event("quantize", what, "s", predicted, seconds, profile.key))
    return predicted


def stages(run: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Keeps the stages of `herd raise`: their seconds and, where it was foretold, their peak memory."""
    key = profiles.key()
    for found in records:
        what = f"{run}: {found['stage']}"
        for kind, unit, predicted, measured in (
            ("stage", "s", found.get("predicted_seconds"), found.get("seconds")),
            ("peak memory", "bytes", found.get("predicted_peak_bytes"), found.get("peak_rss_bytes")),
        ):
            if predicted and measured:
                record(Event(kind, what, unit, float(predicted), float(measured), key))
