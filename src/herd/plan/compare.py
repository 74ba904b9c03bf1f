"""Predictions of times that other verbs have just measured, to print both and to store them with `score`.

`herd bench`, `herd train`, `herd quantize` and `herd raise` pass their results to these functions. The
predictions use no learned factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from ..quant.formats import Scheme
from ..train.config import TrainSettings
from .layout import Job, ParallelLayout
from .profile import SHORT_NAMES, load_profile, machine_key
from .quantizing import quantize_seconds
from .score import ScoredPrediction, record_prediction
from .step import predict_step
from .ways import GGUF_FORMATS, MeasuredTarget


def compare_bench(
    config: ModelConfig, blocks: str, rows: Iterable[MutableMapping[str, Any]], what: str
) -> None:
    """Add ``predicted_seconds`` to the rows of `herd bench` and record both.

    Does nothing without a profile, or if the planner does not know the format of most weights (``blocks``, by
    GGUF's name) or of the KV cache.
    """
    profile, rows = load_profile(), list(rows)
    name = SHORT_NAMES.get(blocks, blocks.lower())
    weights = next((known for known in GGUF_FORMATS if known.dtype == name), None)
    kv = next((row["kv"] for row in rows if "kv" in row), "bf16")
    if profile is None or weights is None or weights.dtype not in profile.gemm or kv not in BYTES:
        return
    here = MeasuredTarget(profile, 0.0)
    for row in rows:
        if row["work"] == "decode":
            seconds = here.decode(config, weights, kv, row["tokens"], row["batch"])
        else:
            seconds = here.prefill(config, weights, kv, row["tokens"]) * row["batch"]
        row["predicted_seconds"] = seconds
        _record(row["work"], f"{what}, {row['name']}", seconds, row["seconds"], profile.key)


def compare_training(
    config: ModelConfig, train: TrainSettings, seconds: float, steps: int, what: str
) -> float | None:
    """Return the predicted seconds of ``steps`` steps on this machine, and record both.

    Returns None without a profile, or if an accelerator did the work.
    """
    profile = load_profile()
    if profile is None or profile.gpus or seconds <= 0 or steps < 1:
        return None
    layout = ParallelLayout(
        micro=train.micro_batch_size or train.batch_size,
        recompute="full" if train.activation_checkpointing else "none",
        precision=train.dtype,
    )
    job = Job(config, train.batch_size, train.context)
    predicted = steps * predict_step(job, layout, profile.machine()).seconds
    _record("train", what, predicted, seconds, profile.key)
    return predicted


def compare_quantizing(
    config: ModelConfig, plan: Scheme, source_bytes: float, seconds: float, what: str
) -> float | None:
    """Return the predicted seconds of `herd quantize` on this machine, and record both.

    ``source_bytes`` is the number of bytes per parameter of the source. Returns None without a profile, or
    for formats that the profile lacks.
    """
    profile = load_profile()
    packed = {found.name for found in plan.plan(config).values() if found.packed}
    if profile is None or not packed <= {
        name for name, short in SHORT_NAMES.items() if short in profile.encode
    }:
        return None
    predicted = quantize_seconds(profile, config, plan, source_bytes)
    _record("quantize", what, predicted, seconds, profile.key)
    return predicted


def record_stages(run: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Record the stages of `herd raise`: their seconds and, if it was predicted, their peak memory."""
    key = machine_key()
    for stage in records:
        what = f"{run}: {stage['stage']}"
        for kind, unit, predicted, measured in (
            ("stage", "s", "predicted_seconds", "seconds"),
            ("peak memory", "bytes", "predicted_peak_bytes", "peak_rss_bytes"),
        ):
            if stage.get(predicted) and stage.get(measured):
                _record(kind, what, float(stage[predicted]), float(stage[measured]), key, unit)


def _record(kind: str, what: str, predicted: float, measured: float, machine: str, unit: str = "s") -> None:
    record_prediction(ScoredPrediction(kind, what, unit, predicted, measured, machine))
