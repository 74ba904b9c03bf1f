"""Where a checkpoint comes from: `herd.json`, beside the weights.

Parents are named by the hash of their weights (`checkpoint_hash`), so a family tree can be checked and not only told:
the hash does not depend on how the tensors were cut into files. Torch-free, so that reports and planners can read it.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError
from ..files import write_atomically

FILE = "herd.json"
FORMAT = 1


def _herd_version() -> str:
    try:
        return version("llamaherd")
    except PackageNotFoundError:
        return "unknown"


class Lineage(BaseModel):
    """What a checkpoint is and what it was made of.

    ``parents`` maps a role or name (``"teacher"``) to the parent's `checkpoint_hash`; ``recipe`` is the validated
    recipe as plain data; ``evals`` maps a measurement's name to its value; `save` fills in ``weights_hash``.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    name: str
    stage: str
    parents: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    data_hash: str | None = None
    evals: dict[str, Any] = Field(default_factory=dict)
    licence: str | None = None
    weights_hash: str | None = None
    created_by: str = Field(default_factory=lambda: f"herd {_herd_version()}")

    def write(self, folder: Path) -> None:
        """Writes ``herd.json`` into a folder that is still being made."""
        (Path(folder) / FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def update_lineage(folder: str | Path, **changes: Any) -> None:
    """Changes fields of a finished folder's ``herd.json``, in one step. `CheckpointError` where there is none."""
    known = load_lineage(folder)
    if known is None:
        raise CheckpointError(f"{folder}: has no {FILE} to change; save the checkpoint with its lineage")
    write_atomically(Path(folder) / FILE, known.model_copy(update=changes).model_dump_json(indent=2) + "\n")


def load_lineage(folder: str | Path) -> Lineage | None:
    """The folder's lineage; None without a ``herd.json``. `CheckpointError` when it cannot be understood."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); restore it or delete it") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: format {found!r} is not known to this version (it reads format {FORMAT}); update llamaherd"
        )
    try:
        return Lineage.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}; restore it or delete it") from error
