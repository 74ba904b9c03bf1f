"""The recipes of a run: each phase of a stage is a file that `herd train` can run as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..train.recipe import Recipe, parse_recipe
from ..train.recipe_yaml import write_yaml
from .data import RunData
from .plan import Phase, TrainingStage

STUDENT_SEED = 1_000_003
"""Offset of the seed of the student's and the control's data, which differ from the teacher's."""


def recipe_folder(folder: Path, stage: TrainingStage, phase: Phase) -> Path:
    """Return the folder of a phase's recipe, state and checkpoint in the run ``folder``."""
    return folder / "stages" / stage.name / phase.name


def write_recipe(data: RunData, stage: TrainingStage, phase: Phase, model: dict[str, Any]) -> Recipe:
    """Write ``recipe.yaml`` of a phase into its folder and return the recipe that was read from it.

    ``model`` is the recipe's section of that name.
    """
    out = recipe_folder(data.folder, stage, phase)
    content = recipe_content(data, stage, phase, model)
    head = (
        f"# {stage.title}. Written by herd raise. To train it with changes, copy this file, change it and\n"
        "# its 'out', and run: herd train FILE\n"
    )
    text = head + write_yaml(content)
    write_atomically(out / "recipe.yaml", text)
    return parse_recipe(text, str(out / "recipe.yaml"))


def recipe_content(
    data: RunData, stage: TrainingStage, phase: Phase, model: dict[str, Any]
) -> dict[str, Any]:
    """Return the recipe of a phase as plain data."""
    plan, folder = data.plan, data.folder
    schedule: dict[str, Any] = {"kind": phase.schedule, "warmup_steps": max(1, phase.steps // 20)}
    if phase.schedule == "cosine":
        decay = max(2, phase.steps // 4)
        schedule |= {"min_lr_ratio": 0.05, "decay_steps": decay, "average_every": max(1, decay // 10)}
    teaches = stage.objective == "distil"
    return {
        "name": "-".join(part for part in (plan.name, stage.name, phase.name) if part),
        "model": model,
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"kind": "mix", "mix": sources(data, stage, phase)},
        "objective": {"kind": stage.objective} | ({"teacher": str(folder / "instruct")} if teaches else {}),
        "optimizer": {"kind": "adamw", "lr": phase.lr},
        "schedule": schedule,
        "train": {
            "steps": phase.steps,
            "batch_size": phase.rows,
            "context": phase.context,
            "seed": plan.seed + (STUDENT_SEED if stage.name in ("student", "control") else 0),
            "dtype": plan.dtype,
            "save_every": max(5, phase.steps // 25),
            "keep_states": 1,
            "eval_every": max(5, phase.steps // 12),
        },
        "save_dtype": "fp32",
        "out": str(recipe_folder(folder, stage, phase)),
    }


def sources(data: RunData, stage: TrainingStage, phase: Phase) -> list[dict[str, Any]]:
    """Return the sources of a recipe's mixture for a phase.

    A source of kind ``corpus`` is replaced by the token shards of its ``kinds`` of text, each with its share
    of the weight. Text that is not in the corpus (the user's may be code only) leaves its share to the
    others.
    """
    split = "student" if stage.name in ("student", "control") else "teacher"
    found: list[dict[str, Any]] = []
    for source in phase.mix:
        if source["kind"] == "needles":
            found.append(source | {"folder": str(data.filler(split).folder)})
        elif source["kind"] == "corpus":
            present = data.shards_of(split, phase.context)
            shares = {kind: share for kind, share in source["kinds"].items() if kind in present}
            shares = shares or dict.fromkeys(present, 1.0)
            heldout = data.shards_of("heldout", phase.context)
            for kind, share in shares.items():
                weight = source["weight"] * share / sum(shares.values())
                shards = {"kind": "shards", "folder": str(present[kind].folder), "weight": round(weight, 3)}
                tested = {"heldout": str(heldout[kind].folder), "heldout_rows": 16} if kind in heldout else {}
                found.append(shards | tested | {"documents": source.get("documents", False)})
        else:
            found.append(source)
    return found
