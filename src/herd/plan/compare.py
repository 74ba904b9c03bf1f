"""Putting what was measured beside what would have been predicted, wherever something is measured anyway.

`herd bench` and `herd raise` hand their results here. What comes back stands in their own output; what is kept is the
history that `score` learns from. Predictions are made without what was learned before, so that a factor is never
learned twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from . import profile as profiles
from .quantizing import SHORT
from .score import Event, record
from .ways import GGUF_FORMS, Here


def bench(config: ModelConfig, blocks: str, rows: Iterable[MutableMapping[str, Any]], what: str) -> None:
    """Adds ``predicted_seconds`` to the rows of `herd bench` and keeps both, where this machine has a profile and the
    weights (``blocks``: GGUF's name of their format) are of a form that is planned for."""
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
        record(Event(row["work"], f"{what}, {row['name']}", "s", row["predicted_seconds"], row["seconds"], profile.key))


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
