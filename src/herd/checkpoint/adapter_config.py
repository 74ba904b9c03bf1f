"""Tell the folder of a LoRA adapter from a model's, and read the name of its base. Does not import torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .hf import read_object
from .lineage import load_lineage
from .paths import ADAPTER, ADAPTER_CONFIG, CONFIG, PICKLED_ADAPTER

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_adapter(path: Path) -> bool:
    """Return whether a folder has an adapter and no model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).exists()


def has_model_and_adapter(folder: Path) -> bool:
    """Return whether a folder has a model and an adapter on it. The model alone is loaded from it."""
    return all((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, ADAPTER))


def base_of(folder: Path) -> str:
    """Return the base model that an adapter's folder names, with a path relative to the folder resolved."""
    return base_in(folder, read_object(folder / ADAPTER_CONFIG))


def base_in(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the base model that the content of ``adapter_config.json`` names, or the one next to it."""
    if has_model_and_adapter(folder):
        return str(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: does not name the base model; add its path")
    beside = folder / base
    if not Path(base).exists() and beside.exists():
        return str(beside.resolve())
    return base if Path(base).exists() or not _HUB_NAME.fullmatch(base) else f"hf:{base}"


def refuse_adapter(folder: Path, what: str) -> None:
    """Raise `CheckpointError` if a folder has only an adapter, for ``what`` needs a whole model."""
    if is_adapter(folder):
        base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: is an adapter for {base}, and {what} needs a whole model; "
            f"merge it first: herd tune merge {folder} --to bf16"
        )


def warn_of_other_base(
    adapter: Path, base: Path, hash_of: Callable[[Path], str | None] | None = None
) -> None:
    """Warn if an adapter was trained on other weights than those of ``base``, its base model, has now.

    ``hash_of`` returns their hash (default: the one in ``herd.json``; without it nothing is known).
    """
    known = load_lineage(adapter) if adapter != base else None
    trained_on = known.parents.get("start") if known else None
    if trained_on is None:
        return
    lineage = load_lineage(base)
    found = hash_of(base) if hash_of is not None else lineage.weights_hash if lineage else None
    if found not in (trained_on, None):
        warnings.warn(f"{adapter}: was trained on other weights than those of {base}", stacklevel=3)


def warn_of_adapter_beside_model(folder: Path) -> None:
    """Warn about an adapter in a folder that has a model of its own, because it is not used."""
    if has_model_and_adapter(folder):
        cure = f"to merge it into the model: herd tune merge {folder} --to bf16"
    else:
        cure = f"to use it, move it to its own folder with {ADAPTER_CONFIG}"
    if found := next((name for name in (ADAPTER, PICKLED_ADAPTER) if (folder / name).exists()), None):
        warnings.warn(f"{folder}: ignoring {found}; {cure}", stacklevel=3)
