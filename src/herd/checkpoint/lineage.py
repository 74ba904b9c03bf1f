"""Read and write `herd.json`: the origin of a checkpoint, and the licence of its weights.

Parents are named by the hash of their weights (`checkpoint_hash`), so a family tree can be verified: the hash
does not depend on how tensors are split into files. This module does not import torch, so reports and
planners can use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import __version__
from ..errors import CheckpointError
from ..files import write_atomically
from ..llama.config import SIZES, ModelConfig

FILE = "herd.json"
FORMAT = 1


class Lineage(BaseModel):
    """The lineage of a checkpoint: its name, stage, parents, recipe and licence.

    ``parents`` maps a role or name ("teacher") to the parent's `checkpoint_hash`. ``recipe`` is the validated
    recipe as plain data. ``evals`` maps a measurement's name to its value. Saving a model fills in
    ``weights_hash``.
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
    created_by: str = f"herd {__version__}"

    @property
    def is_raised(self) -> bool:
        """Whether Herd trained the model on its own dialogs."""
        return self.stage in ("instruct", "student", "control", "sft")

    def write(self, folder: Path) -> None:
        """Write ``herd.json`` into ``folder``."""
        write_atomically(Path(folder) / FILE, self.model_dump_json(indent=2) + "\n")

    def child(self, **changes: Any) -> Lineage:
        """Return the lineage of weights that are made from these by rounding or unpacking."""
        parents = {self.name: self.weights_hash} if self.weights_hash else {}
        return self.model_copy(update={"parents": parents, "evals": {}} | changes)


def update_lineage(folder: str | Path, **changes: Any) -> None:
    """Change fields of a finished folder's ``herd.json``. Raises `CheckpointError` if there is none."""
    known = load_lineage(folder)
    if known is None:
        raise CheckpointError(f"{folder}: has no {FILE} to change; save the checkpoint with its lineage")
    known.model_copy(update=changes).write(Path(folder))


def load_lineage(source: str | Path) -> Lineage | None:
    """Return the lineage of a folder or its ``model.gguf``, or None without a ``herd.json``.

    Raises `CheckpointError` if the file is malformed.
    """
    source = Path(source)
    if source.is_file():
        if source.name != "model.gguf":  # a file that Herd did not write, in any folder
            return None
        source = source.parent
    path = source / FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); restore it or delete it") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: format {found!r} is not known to this version, which reads {FORMAT}; update llamaherd"
        )
    try:
        return Lineage.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}; restore it or delete it") from error


def released_as(config: ModelConfig) -> str | None:
    """Return the name in `SIZES` of this shape, ignoring context and RoPE scaling, or None."""
    for size, released in SIZES.items():
        if released == config.replace(rope_scaling=released.rope_scaling, max_context=released.max_context):
            return size
    return None


def licence_notice(config: ModelConfig) -> str | None:
    """Return the notice that Meta's licence requires if the shape is a released model's, else None."""
    if released_as(config) is None:
        return None
    family = "Llama 3.2" if config.tie_embeddings else "Llama 3.1" if config.rope_scaling else "Meta Llama 3"
    return (
        f"{family} is licensed under the {family} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
