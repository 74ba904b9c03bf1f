"""Write the recipe of a tuning run: a YAML file in its folder that `herd train` would run in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import ModelSource
from ..data.tuning import AnswerPair, Example, TuningRows, read_tuning
from ..dtypes import fast_dtype
from ..errors import DataError, RecipeError
from ..files import write_atomically
from ..machine import available_memory
from ..text import Tokenizer
from ..text.tool_support import with_tool_support
from ..train.recipe import Recipe, parse_recipe
from ..train.recipe_yaml import write_yaml
from .method import MethodChoice, choose_method, default_lr
from .options import TuneOptions

FILE = "recipe.yaml"
STEP_TOKENS = 4096
"""Tokens of one update. LoRA and small data sets learn more from many small steps."""
MICRO_TOKENS = 2048
MAX_CONTEXT = 2048
EPOCHS = 2.0
HELDOUT_ROWS = 64


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: recipe, tokenizer, the data that was found, and the chosen method."""

    recipe: Recipe
    tokenizer: Tokenizer
    data: TuningRows
    choice: MethodChoice
    source: ModelSource
    notes: tuple[str, ...]


def prepare_run(options: TuneOptions) -> Prepared:
    """Read the data, choose what the user left open, and write ``recipe.yaml`` into the run's folder.

    Raises `DataError` if no token would be trained.
    """
    source = ModelSource(options.model)
    config, tokenizer = source.config, source.tokenizer
    if tokenizer is None:
        raise DataError(f"{options.model}: has no tokenizer, and tuning needs one")
    notes = []
    longest = min(options.context or MAX_CONTEXT, config.max_context)
    data = read_tuning(options.data, tokenizer, longest, mask_ends=True)
    if any("with tools" in name for name in data.formats) and not tokenizer.require_chat().supports_tools:
        tokenizer = with_tool_support(tokenizer)
        notes.append("the chat template has no tools; one with tools in ChatML is added to the result")
        data = read_tuning(options.data, tokenizer, longest, mask_ends=True)
    objective = options.objective
    if objective == "auto":
        objective = "dpo" if data.pairs and not data.examples else "sft"
    rows: Sequence[Example | AnswerPair]
    rows = data.require_pairs() if objective == "dpo" else data.require_examples()
    context = options.context or fitting_context(rows, config.max_context)
    out = Path(options.out)
    if tokenizer is not source.tokenizer:
        tokenizer.save(out / "chat", model_max_length=config.max_context)
    dtype = fast_dtype()
    micro = max(1, min(MICRO_TOKENS, STEP_TOKENS) // context)
    batch = max(micro, STEP_TOKENS // context // micro * micro)
    packed = source.file.stat().st_size if source.file is not None else None
    choice = choose_method(
        config, options.method, rows=micro, context=context, dtype=dtype, rank=options.rank,
        packed_nbytes=packed, memory=available_memory(),
    )  # fmt: skip
    kinds = {"rslora": options.rslora, "dora": options.dora}
    if choice.method == "full" and any(kinds.values()):
        names = ", ".join(f"--{name}" for name, given in kinds.items() if given)
        why = f"full fine-tuning was chosen ({choice.reason})"
        raise RecipeError(f"{names}: only adapters can have this, but {why}; add --method lora")
    steps = _steps(options, rows, batch * context)
    fields: dict[str, Any] = {
        "name": out.name if out.name and all(c.isalnum() or c in "._-" for c in out.name) else "tuned",
        "model": {"start": _absolute(options.model)},
        "data": _data_section(options, objective),
        "objective": {"kind": objective},
        "optimizer": {
            "kind": "adamw", "lr": options.lr or default_lr(config, choice.method, objective),
            "weight_decay": 0.0, "betas": [0.9, 0.95],
        },
        "schedule": {"kind": "cosine", "warmup_steps": min(max(1, steps // 20), steps - 1), "decay_steps": 0},
        "train": {
            "steps": steps, "batch_size": batch, "micro_batch_size": micro, "context": context,
            "dtype": dtype, "seed": options.seed, "keep_states": 1, "log_every": 1,
            "save_every": max(1, min(100, steps // 4)),
            "eval_every": max(1, steps // 4) if objective == "sft" else 0,
            "activation_checkpointing": choice.method == "qlora",
        },
        "out": str(out.resolve()),
    }  # fmt: skip
    if tokenizer is not source.tokenizer:
        fields["tokenizer"] = {"path": str((out / "chat").resolve())}
    if choice.method != "full":
        fields["adapter"] = {"rank": options.rank, "packed": choice.method == "qlora"} | kinds
    if objective == "dpo":
        fields["objective"] |= {"reference": _absolute(options.model), "beta": options.beta}
    text = write_yaml(fields)
    recipe = parse_recipe(text, str(out / FILE))
    write_atomically(out / FILE, text)
    return Prepared(recipe, tokenizer, data, choice, source, tuple(notes))


def fitting_context(rows: Sequence[Example | AnswerPair], limit: int) -> int:
    """Return the context: a multiple of 64 from 256 to ``limit`` that the longest example fits in."""
    lengths = [
        len(row.rendered.ids)
        if isinstance(row, Example)
        else 2 * max(len(row.chosen.ids), len(row.rejected.ids))
        for row in rows
    ]
    wanted = -(-max(lengths) // 64) * 64
    return min(limit, max(512, wanted))


def _steps(options: TuneOptions, rows: Sequence[Example | AnswerPair], step_tokens: int) -> int:
    if options.steps is not None:
        return options.steps
    if options.tokens is not None:
        return max(1, options.tokens // step_tokens)
    n_tokens = sum(
        len(row.rendered.ids) if isinstance(row, Example) else len(row.chosen.ids) + len(row.rejected.ids)
        for row in rows
    )
    share = 1 - options.replay_share if options.replay else 1.0
    return max(2, math.ceil((options.epochs or EPOCHS) * n_tokens / share / step_tokens))


def _data_section(options: TuneOptions, objective: str) -> dict[str, Any]:
    section: dict[str, Any] = {
        "paths": [_absolute(path) for path in options.data],
        "heldout_rows": HELDOUT_ROWS,
    }
    if options.heldout is not None:
        section["heldout"] = _absolute(options.heldout)
    if objective == "dpo":
        return {"kind": "preferences"} | section
    if options.replay:
        section |= {
            "replay": [_absolute(path) for path in options.replay],
            "replay_share": options.replay_share,
        }
    return {"kind": "tuning"} | section


def _absolute(name: str) -> str:
    """Return a path from the root, so that the recipe runs from any folder. Names are unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
