"""Read the keys of earlier recipes under their present names."""

from __future__ import annotations

from typing import Any

from .recipe_yaml import KeyPath
from .schedules import Cosine

RENAMED = {
    "train.batch_rows": "train.batch_size",
    "train.micro_rows": "train.micro_batch_size",
    "train.remat": "train.activation_checkpointing",
    "train.anneal_steps": "schedule.decay_steps",
    **{f"train.{key}": f"optimizer.{key}" for key in ("lr", "weight_decay", "betas", "eps", "clip")},
    **{f"train.{key}": f"schedule.{key}" for key in Cosine.model_fields if key != "kind"},
    "data.text": "data.paths",
    "data.shards": "data.folder",
    "data.dialogs": "data.path",
    "data.made_dialogs": "data.count",
}
"""Keys of earlier recipes, and their present names. Their meanings and defaults are the same."""


def rename_keys(data: dict[Any, Any], lines: dict[KeyPath, int]) -> list[str]:
    """Rename the keys of an earlier recipe in ``data``, with the ``lines`` of them. Return what was renamed.

    A key stays, to be refused, if its present name is given too. In earlier recipes the key of the data
    named its kind, and there was one kind of schedule.
    """
    notes = []
    for old, new in RENAMED.items():
        (section, key), (to, name) = old.split("."), new.split(".")
        values, target = data.get(section), data.get(to, {})
        if not isinstance(values, dict) or key not in values or not isinstance(target, dict):
            continue
        if name in target or (section == "data" and "kind" in values):
            continue
        if to == "schedule":
            target.setdefault("kind", "cosine")
        if section == "data":
            values["kind"] = key
        data[to] = target
        target[name] = values.pop(key)
        lines[(to, name)] = lines[(section, key)]
        lines.setdefault((to,), lines[(section, key)])
        lines |= {(to, name, *at[2:]): line for at, line in lines.items() if at[:2] == (section, key)}
        notes.append(f"{old} as {new}" + (f" (data.kind: {key})" if section == "data" else ""))
    return notes
