"""A toy to shrink: random sentences, and the settings of a short run."""

from __future__ import annotations

import random
from pathlib import Path

from herd.distill.cells import ShrinkSettings

WORDS = "the quick brown fox jumps over lazy dog and then runs away from every cat in town because it can"


def words(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS.split(), k=12)) + "." for _ in range(n))


def settings(toy: Path, **changes) -> ShrinkSettings:
    fields = {
        "model": str(toy / "teacher"), "text": (str(toy / "train.txt"),), "heldout": (str(toy / "heldout.txt"),),
        "to": "params=36k", "tokens": 4096, "race_tokens": 1024, "arms": 2, "context": 32, "batch_size": 4, "lr": 1e-3,
        "heldout_tokens": 3000,
    }  # fmt: skip
    return ShrinkSettings(**(fields | changes))  # type: ignore[arg-type]
