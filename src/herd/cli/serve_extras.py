"""Assign the drafts and the adapters of `herd serve` to the served models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def assign_drafts(names: Sequence[set[str]], given: Sequence[str]) -> list[str | None]:
    """Return the draft of each model (None: it has none). ``names`` are the names of each model.

    An option is MODEL=DRAFT, or DRAFT if there is one model. Raises ConfigError for one that fits no model.
    """
    drafts: list[str | None] = [None] * len(names)
    for text in given:
        number, draft = _split_owner(text, names, "=")
        if number is None and len(names) == 1:
            number = 0
        if number is None or not draft:
            raise ConfigError(f"--draft {text}: give MODEL=DRAFT with a served model ({_listed(names)})")
        if drafts[number] is not None:
            raise ConfigError(f"--draft {text}: the model already has the draft {drafts[number]}; give one")
        drafts[number] = draft
    return drafts


def assign_adapters(
    sources: Sequence[Any], names: Sequence[set[str]], given: Sequence[str]
) -> list[dict[str, Path]]:
    """Return the names and folders of the adapters of each model.

    An option is NAME=FOLDER of an adapter whose base is among the ``sources`` (or there is only one), or
    MODEL/NAME=FOLDER. Raises ConfigError for one that fits no model, and for a name that is taken. Warns of
    one that was trained on other weights.
    """
    from ..checkpoint.adapter_config import warn_of_other_base

    adapters: list[dict[str, Path]] = [{} for _ in sources]
    taken = set[str]().union(*names)
    for text in given:
        number, rest = _split_owner(text, names, "/")
        name, _, folder = rest.partition("=")
        if not name or not folder:
            raise ConfigError(f"--adapter {text}: give NAME=FOLDER, e.g. support=runs/tune/support/adapter")
        if name in taken:
            raise ConfigError(f"--adapter {text}: another model or adapter is named {name}; rename one")
        if number is None:
            number = 0 if len(sources) == 1 else _base_number(sources, Path(folder))
        if number is None:
            raise ConfigError(
                f"--adapter {text}: its base is not a served model; serve it too, or say which of "
                f"{_listed(names)} it changes with MODEL/{name}={folder}"
            )
        warn_of_other_base(Path(folder), sources[number].path)
        adapters[number][name] = Path(folder)
        taken.add(name)
    return adapters


def _split_owner(text: str, names: Sequence[set[str]], separator: str) -> tuple[int | None, str]:
    """Return the number (or None) of the model whose name begins ``text``, and the rest of the text."""
    owners = {name: number for number, own in enumerate(names) for name in own}
    name = max((name for name in owners if text.startswith(name + separator)), key=len, default=None)
    return (None, text) if name is None else (owners[name], text[len(name) + 1 :])


def _base_number(sources: Sequence[Any], folder: Path) -> int | None:
    """Return the number of an adapter's base: the path that it names, or the hash of its training's start."""
    from ..checkpoint.adapter_config import base_of
    from ..checkpoint.lineage import load_lineage
    from ..checkpoint.sources import path_on_disk

    base, lineage = path_on_disk(base_of(folder)), load_lineage(folder)
    start = None if lineage is None else lineage.parents.get("start")
    for number, source in enumerate(sources):
        if base is not None and base.resolve() == source.path.resolve():
            return number
    for number, source in enumerate(sources):
        if start is not None and source.lineage is not None and source.lineage.weights_hash == start:
            return number
    return None


def _listed(names: Sequence[set[str]]) -> str:
    return ", ".join(min(own, key=len) for own in names) or "there is none"
