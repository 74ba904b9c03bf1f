"""The folder of a shrink run: settings, finished cells, and how long a cell takes.

    shrink.json            the settings (those of text and teacher must not change)
    cells/NAME.json        the result of a finished cell: it is not computed again
    own/                   dialogs that the teacher wrote
    text-V/, targets-V/    token shards and the teacher's targets in a vocabulary of V tokens
    heldout-V/             the teacher's hidden states of held-out text
    teacher/               the teacher that was corrected on the text, if that was asked for
    arms/NAME/             start (the pruned checkpoint), recipe-*.yaml, run-TOKENS-lrRATE/ (state, metrics,
                           model)
    scores/NAME/           answers to the items of tasks
    model/, model-q4/      the student in bf16 and quantized
    ledger.json, ledger.html

A cell may be interrupted at any moment. Labelling and training continue inside a cell, everything else starts
the cell again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from ..data.corpus import require_apart, require_unseen
from ..errors import ConfigError
from ..files import require_own, write_json
from ..llama.config import ModelConfig
from ..train.section import ComputeDtype, Positive, PositiveReal, Section
from ..units import duration

SETTINGS = "shrink.json"
LR_WIDTH = 0.1
"""Learning rate times the width of the model, for short recoveries in batches of some thousand tokens.

It is 1.7e-4 at 576 channels and 2.4e-5 at 4,096. Batches of a million tokens bear about four times as much. A
model that lost little needs less than one that lost much: hence the sweep.
"""
BEGUN = ("own", "teacher", "heldout-*", "targets-*", "arms")
"""Names in a run folder that took more than a probe. Without any, other settings replace those of the run."""
FREE = ("to", "vocab", "tokens", "race_tokens", "arms", "lr", "sweep_tokens", "gguf", "qad_tokens")
"""Settings that may change at any time, because a result that depends on them has them in its name.

Targets depend on none of them, so they are made once, and several rates and sizes can be tried.
"""
SILENCE = (5.0, 60.0)
"""Least and most seconds between two lines about the progress of a cell. They grow to a tenth of its time."""
SWEEP = (0.2, 0.6, 2.0)
"""Factors of the usual learning rate that a sweep tries."""


class ShrinkSettings(Section):
    """The settings of a shrink run. Only those in `FREE` may change when the run is continued."""

    model: str
    to: str | None = None  # the budget; None: only the vocabulary becomes smaller
    vocab: tuple[int, ...] = ()  # allowed sizes of the vocabulary (empty: only the teacher's)
    text: tuple[str, ...] = ()
    dialogs: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    own_text: bool = False  # the teacher writes as many tokens as the recovery reads
    tokens: int = Field(1_300_000, ge=0)  # of the winner's recovery; 0: only pruned
    race_tokens: int = Field(250_000, ge=0)  # of every arm of the race
    arms: Positive = 3
    context: Positive = 512
    batch_size: Positive = 4
    lr: PositiveReal | None = None  # None: `LR_WIDTH` / width, times the best factor of a sweep
    sweep_tokens: int = Field(50_000, ge=0)  # of each learning rate of the sweep; 0: no sweep
    kl_weight: float = Field(1.0, ge=0, le=1)
    dtype: ComputeDtype = "fp32"
    heldout_tokens: Positive = 20_000
    n_draws: Positive = 50
    calibration_rows: Positive = 4
    seed: int = 0
    gguf: str | None = None  # also write a GGUF file in this format
    qad_tokens: int = Field(0, ge=0)  # of distilling the student in that format; 0: only round it
    correct_tokens: int = Field(0, ge=0)  # of text that the teacher is trained on before it labels
    tasks: tuple[str, ...] = ()  # of `herd eval`, for the ledger
    task_data: str | None = None  # folder of their items; None: the built-in ones
    task_limit: Positive | None = None

    def learning_rate(self, config: ModelConfig) -> float:
        """Return the peak learning rate for a student."""
        return self.lr if self.lr is not None else LR_WIDTH / config.dim

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    def steps(self, tokens: int) -> int:
        """Return the number of updates that read ``tokens`` tokens."""
        return max(1, -(-tokens // self.tokens_per_step))

    def train_section(self, steps: int) -> dict[str, Any]:
        """Return what the section ``train`` of every recipe of the run has in common."""
        return {
            "steps": steps, "batch_size": self.batch_size, "context": self.context, "dtype": self.dtype
        }  # fmt: skip


class Cells:
    """The finished cells of a run folder, and the display of those in work."""

    def __init__(self, folder: Path, settings: ShrinkSettings, say: Callable[[str], None]) -> None:
        self.folder, self.settings, self.say = folder, settings, say
        trained = (*settings.text, *settings.dialogs)
        require_apart(folder, (*trained, *settings.heldout))
        require_unseen(settings.heldout, trained)
        require_own(folder, SETTINGS, ("cells", "own", "teacher", "arms", "scores", "model", "ledger.json"))
        path = folder / SETTINGS
        if path.exists():
            known = ShrinkSettings.model_validate_json(path.read_text(encoding="utf-8"), strict=False)
            free = {*FREE} - ({"tokens", "race_tokens"} if settings.own_text else set())  # of the text, then
            for name, old in known:
                if old == getattr(settings, name) or name in free:
                    continue
                if any(path for pattern in BEGUN for path in folder.glob(pattern)):
                    raise ConfigError(
                        f"{folder}: was begun with {name}={old!r}, not {getattr(settings, name)!r}: "
                        "repeat the old command to continue it, or choose another --out"
                    )
                for prepared in (folder / "cells", *folder.glob("text-*")):
                    shutil.rmtree(prepared, ignore_errors=True)
                break

    def done(self, name: str) -> dict[str, Any] | None:
        """Return the result of a finished cell, or None."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def run(
        self, name: str, what: str, predicted: float | None, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the result of a cell. If it is not finished, say ``what`` is done, and do it."""
        if (known := self.done(name)) is not None:
            return known
        write_json(self.folder / SETTINGS, self.settings.model_dump(mode="json"))
        self.say(what if predicted is None else f"{what}: about {duration(predicted)}")
        began = time.perf_counter()
        record = work()
        record = {"wall_seconds": time.perf_counter() - began, "predicted_seconds": predicted} | record
        self._path(name).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name), record)
        return record

    def progress(self, what: str, unit: str) -> Callable[[int, int, str], None]:
        """Return a function of units done, all units and a note that says now and then how far ``what`` is.

        A resumed cell begins with units done before. So the time left is predicted from the second call on.
        """
        first, began, shown = -1, 0.0, 0.0

        def show(done: int, total: int, note: str) -> None:
            nonlocal first, began, shown
            now = time.monotonic()
            if first < 0:
                first, began, shown = done, now, now
            elif done > first and now - shown >= min(max(SILENCE[0], (now - began) / 10), SILENCE[1]):
                left = (total - done) * (now - began) / (done - first)
                self.say(f"{what}: {unit} {done:,} of {total:,}{note}, {duration(left)} left")
                shown = now

        return show

    def _path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"
