"""A run on disk and its stages. Finished stages are kept, and an interrupted stage is resumed.

    runs/NAME/run.json                     the plan, written first, with machine.json
    runs/NAME/stages/STAGE/stage.json      written at the end of the stage: seconds, tokens, FLOPs, memory
    runs/NAME/stages/STAGE[/PHASE]/        recipe.yaml, metrics.jsonl, the checkpoint model/, and state/, the
                                           loop's resumable state, removed when the stage is done
    runs/NAME/{teacher,long,instruct,student,control}/    checkpoint folders
    runs/NAME/{scores,samples}.json, report.html

A stage may be interrupted at any moment, because each file is either complete or absent, and repeating the
work gives the same bytes. Resuming therefore goes through the stages and skips the finished ones.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_json
from ..machine import peak_memory, reset_peak_memory
from ..report import receipt
from .data import RunData
from .plan import Plan
from .show import Show


@dataclass
class Outcome:
    """The results of a stage as stored in ``stage.json``."""

    model: str | None = None  # the stage's checkpoint folder, relative to the run
    n_params: int | None = None
    tokens: int = 0  # trained tokens
    flops: float = 0.0  # including a teacher's forward passes
    earlier_seconds: float = 0.0  # spent before the last interruption
    predicted_bytes: int | None = None  # predicted growth of the process
    gates: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RaiseStage:
    """A stage of a run: its name, its title in the terminal, and its function."""

    name: str
    title: str
    work: Callable[[RaiseRun], Outcome]


@dataclass
class RaiseRun:
    """An open run folder with its plan, its data and the terminal's display."""

    folder: Path
    plan: Plan
    show: Show

    @functools.cached_property
    def data(self) -> RunData:
        return RunData(self.plan, self.folder)

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Raise `DataError` if ``folder`` has contents. A new run never changes existing files."""
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists already: add --resume to continue it, or choose another --name")

    @staticmethod
    def create(folder: Path, plan: Plan) -> None:
        """Create ``folder`` and write its plan."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", plan.model_dump())
        where = {"machine": receipt.describe_machine(), "commit": receipt.git_commit(Path(__file__).parent)}
        write_json(folder / "machine.json", where)

    @classmethod
    def saved_plan(cls, folder: Path) -> Plan:
        """Return the plan of an existing run. Raises `DataError` if it is missing or cannot be read."""
        path = folder / "run.json"
        try:
            return Plan.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise DataError(f"{folder} is not a run: run.json is missing") from None
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path} is damaged or from another version ({reason})") from None

    def stage_folder(self, stage: str) -> Path:
        folder = self.folder / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def done(self, stage: str) -> bool:
        return (self.folder / "stages" / stage / "stage.json").exists()

    def record(self, stage: str) -> dict[str, Any]:
        """Return the ``stage.json`` of a stage that is done."""
        return json.loads((self.folder / "stages" / stage / "stage.json").read_text())

    def carry_out(self, stages: list[RaiseStage]) -> None:
        """Do the unfinished stages in order, and remove the training state of each."""
        for stage in stages:
            if self.done(stage.name):
                self.show.skip(stage.name)
                continue
            self.show.begin(stage.name, stage.title)
            reset_peak_memory()
            before, began = peak_memory(), time.perf_counter()
            outcome = stage.work(self)
            seconds = outcome.earlier_seconds + time.perf_counter() - began
            folder = self.stage_folder(stage.name)
            record = asdict(outcome)
            grown, extra = record.pop("predicted_bytes"), record.pop("extra")
            del record["earlier_seconds"]  # counted in the stage's seconds
            record |= {
                "stage": stage.name,
                "title": stage.title,
                "seconds": seconds,
                "predicted_seconds": self.plan.predicted_seconds.get(stage.name),
                "peak_rss_bytes": peak_memory(),
                "predicted_peak_bytes": None if grown is None else before + grown,
            }
            write_json(folder / "stage.json", record | extra)
            for state in folder.rglob("state"):
                shutil.rmtree(state, ignore_errors=True)
            self.show.end(seconds)
