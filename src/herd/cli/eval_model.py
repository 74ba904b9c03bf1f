"""Open the model, the data sets and the results folder that the verbs of `herd eval` work with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..evals.harness import Model
    from ..evals.local import CheckpointModel
    from ..evals.tasks import Data, Mode

DataOption = Annotated[
    Path | None,
    typer.Option(help="Folder of data sets, or hf to download them (default: ten built-in items per task)."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N items of each task.")]
Out = Annotated[Path | None, typer.Option(help="Folder of results (default: runs/evals/NAME-HASH).")]


def data_source(folder: Path | None) -> Data:
    """Return the data sets in a folder, those of the hub for "hf", or the built-in items for None."""
    from ..evals.tasks import Data
    from ..evals.tasks.hub_data import HubData

    if folder == Path("hf"):
        return HubData()
    return Data() if folder is None else Data(folder)


def open_local(
    model: str, mode: Any = None, dtype: str | None = None, device: str | None = None, batch: int = 32
) -> CheckpointModel:
    """Open a checkpoint for the harness. Without ``mode``, prompts are as in the model's training."""
    from ..checkpoint import checkpoint_hash
    from ..checkpoint.sources import model_name
    from ..evals.local import CheckpointModel
    from .chat_model import load_chat_model

    loaded = load_chat_model(model, dtype, device)
    lineage = loaded.lineage
    talks = loaded.tokenizer.chat is not None
    if mode is None and not loaded.is_base and not talks:
        print(f"{model} has no chat format; its prompts are for base models", file=sys.stderr)
    hash_ = (lineage.weights_hash if lineage else None) or checkpoint_hash(loaded.folder)
    called = lineage.name if lineage else model_name(loaded.folder)
    kind: Mode = mode or ("base" if loaded.is_base or not talks else "instruct")
    return CheckpointModel(
        loaded.model, loaded.tokenizer, name=called, hash=hash_, mode=kind, max_batch=batch
    )


def results_folder(model: Model) -> Path:
    """Return the default folder of a model's results."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in model.name)
    return Path("runs") / "evals" / f"{safe}-{model.hash[:8]}"
