"""Write the recipe of a tuning run: a YAML file in its folder that `herd train` would run in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import units
from ..checkpoint import ModelSource
from ..checkpoint.adapter_config import refuse_adapter
from ..data.tuning import LEAST, AnswerPair, Example, SetAside, TuningRows, read_tuning, row_key
from ..dtypes import fast_dtype
from ..errors import DataError, RecipeError
from ..files import write_atomically
from ..machine import available_memory
from ..text import Tokenizer
from ..text.tool_support import with_tool_support
from ..train import parallel
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
    """Read the data, choose what the user left open, and write options and recipe into the run's folder.

    Raises `DataError` if no token would be trained, and `RecipeError` if the memory does not suffice.
    """
    source, tokenizer, data = read_examples(options.model, options.data, options.context)
    if source.adapter is not None:
        refuse_adapter(source.adapter, "tuning")
    config = source.config
    notes = []
    if tokenizer is not source.tokenizer:
        notes.append("the chat template has no tools; one with tools in ChatML is added to the result")
    objective = options.objective
    if objective == "auto":
        objective = "dpo" if data.pairs and not data.examples else "sft"
    rows, context = _trained_rows(options, objective, tokenizer, data, config.max_context)
    if options.heldout is None and len(rows) < LEAST:
        notes.append("too few to hold some out: nothing is measured on your data; give --heldout FILE")
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
    free = available_memory()
    if choice.nbytes > free and parallel.device_of_rank().type == "cpu":
        raise RecipeError(
            f"{choice.method} needs {units.nbytes(choice.nbytes)} of memory, {units.nbytes(free)} are free: "
            f"give a smaller --context than {context}, a smaller --rank, or a quantized model and --method "
            "qlora"
        )
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
    options.store()
    write_atomically(out / FILE, text)
    return Prepared(recipe, tokenizer, data, choice, source, tuple(notes))


def read_examples(
    model: str, paths: Sequence[str], context: int | None
) -> tuple[ModelSource, Tokenizer, TuningRows]:
    """Return a model, the tokenizer to tune it with, and the rows of files, as long as ``context`` allows.

    The tokenizer is the model's own, or has a template with tools too, if rows have tools that it lacks.
    """
    source = ModelSource(model)
    most = source.config.max_context
    if context is not None and context > most:
        raise RecipeError(f"--context {context} exceeds the {most} tokens of {model}; give less")
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise DataError(f"{model}: has no tokenizer; put its tokenizer.json or tokenizer.model there")
    longest = min(context or MAX_CONTEXT, most)
    data = read_tuning(paths, tokenizer, longest, mask_ends=True)
    if any("with tools" in name for name in data.formats) and not tokenizer.require_chat().supports_tools:
        tokenizer = with_tool_support(tokenizer)
        data = read_tuning(paths, tokenizer, longest, mask_ends=True)
    return source, tokenizer, data


def _trained_rows(
    options: TuneOptions, objective: str, tokenizer: Tokenizer, data: TuningRows, most: int
) -> tuple[Sequence[Example | AnswerPair], int]:
    """Return the rows of a run and its context. Every other row is set aside in ``data``.

    Raises DataError if there are none, also among those that are held out or mixed in.
    """
    rows: Sequence[Example | AnswerPair] = (
        data.require_pairs() if objective == "dpo" else data.require_examples()
    )
    context = options.context or fitting_context(rows, most)
    others, why = (
        (data.examples, "not a pair of answers, as all rows of dpo must be")
        if objective == "dpo"
        else (data.pairs, "a pair of answers among dialogs or texts; tune pairs on their own")
    )
    data.set_aside += [SetAside(row.where, why) for row in others]
    others.clear()
    if objective == "dpo" and options.replay:
        raise DataError("--replay: nothing can be mixed into pairs of answers; leave it out")
    for path in (*options.replay, *([options.heldout] if options.heldout else [])):
        found = read_tuning([path], tokenizer, context, mask_ends=True)
        usable = found.require_pairs() if objective == "dpo" else found.require_examples()
        data.set_aside += found.set_aside
        if path == options.heldout:
            trained = {row_key(row) for row in rows}
            same = sum(row_key(row) in trained for row in usable)
            if same == len(usable):
                raise DataError(f"{path}: every row is also in {', '.join(options.data)}; hold out others")
            data.notes.update({f"{path}: held out, and trained on too": same} if same else {})
    return rows, context


def fitting_context(rows: Sequence[Example | AnswerPair], limit: int) -> int:
    """Return the context: a multiple of 64 from 512 to ``limit`` that the longest example fits in."""
    lengths = [
        len(row.rendered.ids)
        if isinstance(row, Example)
        else 2 * max(len(row.chosen.ids), len(row.rejected.ids))
        for row in rows
    ]
    wanted = -(-max(lengths, default=0) // 64) * 64
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
