"""The state of a run on disk, which is either complete or absent.

``folder/state/step-00000200/`` has the trainable weights, the optimizer's moments and the mean of the
decay's weights as DCP tensors (`storage.py`), and ``state.json``: the progress of the run and the settings
that determine its numbers. A state is written under a temporary name, flushed, and put in place by one
rename, so a kill at any moment leaves the old states, with or without the new one. Folders that were never
renamed are ignored, and removed by the next start. The stream's position follows from the step, so no random
state has to be saved.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..errors import StorageError, TrainingError
from ..files import flush_folder, put_in_place, require_free_space, write_json
from .parallel import Ranks
from .storage import RawFiles

VERSION = 2  # 1: before optimizer and schedule had sections of their own
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    ``signature`` is everything that determines its numbers: configuration, model, objective, stream.
    """

    step: int
    seconds: float
    last: dict[str, Any]  # the record of that step
    average_count: int
    finished: bool
    world: int
    signature: dict[str, Any]


def states(folder: Path) -> list[Path]:
    """Return the complete states of a run, oldest first."""
    found = [p for p in (Path(folder) / "state").glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path) -> Path | None:
    """Return the state that a run continues from, or None when there is none yet."""
    return next(reversed(states(folder)), None)


def tidy(folder: Path) -> None:
    """Remove partly written and partly removed states of a killed run."""
    for path in (Path(folder) / "state").glob(".step-*"):
        shutil.rmtree(path)


def save(folder: Path, progress: Progress, tensors: Mapping[str, Tensor], ranks: Ranks, *, keep: int) -> Path:
    """Write a state, remove all but the newest ``keep``, and return its path. All ranks call this together.

    Raises `TrainingError` if the disk is full or cannot be written. Earlier states are unchanged.
    """
    home = Path(folder) / "state"
    final = home / f"step-{progress.step:08d}"
    temporary = home / f".{final.name}.tmp"
    try:
        if ranks.first:
            require_free_space(home, sum(tensor.nbytes for tensor in tensors.values()))
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        ranks.barrier()
        _dcp(dcp.save, tensors, ranks, storage_writer=RawFiles(temporary))
        if ranks.first:
            write_json(temporary / "state.json", {"version": VERSION, **asdict(progress)})
            flush_folder(temporary)
            put_in_place(temporary, final)
            for old in states(folder)[:-keep]:
                # a state under its own name is complete
                doomed = old.rename(old.with_name(f".{old.name}.old"))
                shutil.rmtree(doomed)
        ranks.barrier()
    except (OSError, StorageError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = newest(folder)
        kept = f"{last} is kept" if last else "there is no earlier state"
        reason = f"cannot save state {final}: {_reason(error)}"
        raise TrainingError(f"{reason}; free disk space and start again; {kept}") from error
    return final


def progress_of(path: Path) -> Progress:
    """Read how far a state is. Raises `TrainingError` naming it and the cure when it cannot be read."""
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
    """Read a state into ``tensors`` in place, also one that another number of ranks wrote.

    Raises `TrainingError` naming the state and the cure when a file is missing, short or does not match its
    checksum.
    """
    try:
        _dcp(dcp.load, tensors, ranks, storage_reader=RawFiles(path))
    except Exception as error:
        raise _corrupt(path, error) from error


def require_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `TrainingError` naming the first difference between the run that wrote a state and this one."""
    for key in dict.fromkeys([*now, *then]):
        old, new = then.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):  # name the field: model.dim
            name = next(name for name in {**new, **old} if old.get(name) != new.get(name))
            key, old, new = f"{key}.{name}", old.get(name), new.get(name)
        raise TrainingError(
            f"{path} was trained with {key}={old!r}, not {new!r}: "
            "restore it to resume, or train into another folder"
        )


def _dcp(action: Any, tensors: Mapping[str, Tensor], ranks: Ranks, **storage: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            action(dict(tensors), no_dist=ranks.mesh is None, **storage)
        except dcp.CheckpointException as error:  # wraps the errors of all ranks, Ctrl-C included
            raise next(iter(error.failures.values()))[0] from error


def _corrupt(path: Path, error: Exception) -> TrainingError:
    older = [state for state in states(path.parents[1]) if state != path]
    then = f"resume from {older[-1].name}" if older else "start from the beginning"
    return TrainingError(f"state {path} is corrupt ({_reason(error)}): remove this folder to {then}")


def _reason(error: BaseException) -> str:
    """Return the cause in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, StorageError):
        return str(error).partition(";")[0]  # the cure follows in the message around it
    ours = isinstance(error, TrainingError | OSError)
    return (str(error) if ours else f"{type(error).__name__}: {error}").strip().splitlines()[0]
