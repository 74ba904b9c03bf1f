"""The state of a run on disk: whole or not at all.

``folder/state/step-00000200/`` holds weights, Adam's moments and the mean of the decay's weights as DCP tensors
(`storage.py`) and ``state.json``: how far the run is and what decided it. A state is written under a temporary name,
flushed, and made real by one rename; a kill at any moment leaves either the old states or one more. What was never
renamed is ignored and removed by the next start. The stream's position is a function of the step, so no random state
needs keeping.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..errors import TrainingError
from .parallel import Ranks
from .storage import RawReader, RawWriter

VERSION = 2  # 1: before batch_rows, micro_rows and anneal_steps got their present names
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``signature`` is what decided its numbers: configuration, model, objective, stream."""

    step: int
    seconds: float
    last: dict[str, Any]  # the record of that step
    average_count: int
    finished: bool
    world: int
    signature: dict[str, Any]


def states(folder: Path) -> list[Path]:
    """The whole states of a run, oldest first."""
    found = [p for p in (Path(folder) / "state").glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path) -> Path | None:
    """The state a run goes on from; None when there is none yet."""
    return next(reversed(states(folder)), None)


def tidy(folder: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in (Path(folder) / "state").glob(".step-*"):
        shutil.rmtree(path)


def save(folder: Path, progress: Progress, tensors: Mapping[str, Tensor], ranks: Ranks, *, keep: int) -> Path:
    """Write a state (a collective) and remove all but the newest ``keep``. Returns its path.

    Raises `TrainingError` when the disk is full or cannot be written; what was there before stays.
    """
    home = Path(folder) / "state"
    final = home / f"step-{progress.step:08d}"
    temporary = home / f".{final.name}.tmp"
    try:
        if ranks.first:
            _require_room(home, sum(t.numel() * t.element_size() for t in tensors.values()))
            home.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        ranks.barrier()
        _dcp(dcp.save, dict(tensors), ranks, storage_writer=RawWriter(temporary))
        if ranks.first:
            _write_json(temporary / "state.json", {"version": VERSION, **asdict(progress)})
            _flush_folder(temporary)
            os.rename(temporary, final)
            _flush_folder(home)
            for old in states(folder)[:-keep]:
                _remove(old)
        ranks.barrier()
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = newest(folder)
        kept = f"{last} is kept" if last else "there is no earlier state"
        reason = f"cannot save state {final}: {_reason(error)}"
        raise TrainingError(f"{reason}; free disk space and start again; {kept}") from error
    return final


def progress_of(path: Path) -> Progress:
    """What a state says about itself. Raises `TrainingError` naming it and the cure when it cannot be read."""
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = record.pop("version")
        if version == VERSION:
            return Progress(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, error) from error
    raise TrainingError(
        f"state {path} has format {version} and this version of Herd reads format {VERSION}: "
        "finish the run with the version that started it, or train into another folder"
    )


def load(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read a state into ``tensors``, in place, whatever number of ranks wrote it (a collective).

    Raises `TrainingError` naming the state and the cure when a file is missing, short or does not match its checksum.
    """
    try:
        _dcp(dcp.load, dict(tensors), ranks, storage_reader=RawReader(path))
    except Exception as error:
        raise _corrupt(path, error) from error


def require_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `TrainingError` naming the first difference between the run that wrote a state and this one."""
    for key in dict.fromkeys([*now, *then]):
        if then.get(key) != now.get(key):
            raise TrainingError(
                f"{path} was trained with {key}={then.get(key)!r}, not {now.get(key)!r}: "
                "restore it to resume, or train into another folder"
            )


def discard(folder: Path) -> None:
    """Remove all states of a run: its result is a checkpoint now."""
    shutil.rmtree(Path(folder) / "state", ignore_errors=True)


def _dcp(action: Any, tensors: dict[str, Tensor], ranks: Ranks, **storage: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            action(tensors, no_dist=ranks.mesh is None, **storage)
        except dcp.CheckpointException as error:  # wraps whatever went wrong on some rank, Ctrl-C included
            raise next(iter(error.failures.values()))[0] from error


def _remove(path: Path) -> None:
    """Rename first: a state with its right name is always whole."""
    doomed = path.with_name(f".{path.name}.old")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _require_room(home: Path, nbytes: int) -> None:
    place = home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(f"it needs {nbytes / 1e6:.0f} MB and {place} has {free / 1e6:.0f} MB free")


def _corrupt(path: Path, error: Exception) -> TrainingError:
    older = [state for state in states(path.parents[1]) if state != path]
    then = f"resume from {older[-1].name}" if older else "start from the beginning"
    return TrainingError(f"state {path} is corrupt ({_reason(error)}): remove this folder to {then}")


def _reason(error: BaseException) -> str:
    """The cause in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error) if isinstance(error, TrainingError | OSError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
