"""Run a recipe: load or draw its model, open its data, train, and write a checkpoint folder at the end.

Mistakes are refused before weights are allocated. The first rank makes shards and a new tokenizer once, under
``out``. A later start finds them there, and the loop continues from its newest state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoint import (
    Lineage,
    checkpoint_hash,
    load_config,
    load_tokenizer,
    load_trainable,
    weight_reader,
    write_checkpoint,
)
from ..checkpoint.adapters import save_adapter
from ..checkpoint.gguf_folder import FileContent, write_gguf_folder
from ..data.origin import bind
from ..dtypes import torch_dtype
from ..errors import RecipeError
from ..llama.config import ModelConfig
from ..llama.fill import fill_parameter
from ..llama.lora import merged_parameter
from ..llama.model import LlamaLM
from ..machine import lock_folder
from ..text import Tokenizer
from . import parallel
from .heldout import accuracy, heldout_loss
from .loop import TrainResult, train
from .objectives import Objective
from .parallel import Ranks
from .recipe import Recipe, check_recipe
from .sources import OpenedData, warn_of_repeats

PREPARED = ("tokenizer", "shards", "parts", "state", "model", "adapter")
"""Names in a run's folder that are made from its data."""


def run_recipe(
    recipe: Recipe,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_begin: Callable[[LlamaLM, Tokenizer], None] | None = None,
    on_evaluate: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Path, TrainResult]:
    """Train by the recipe on all processes of ``torchrun``. Return the checkpoint folder and the outcome.

    The first rank calls ``on_begin(model, tokenizer)`` before training, ``on_step(record)`` after every
    logged step and ``on_evaluate(scores)`` after every evaluation. Raises the `HerdError` of the room whose
    input is wrong, and KeyboardInterrupt after Ctrl-C, with the state saved.
    """
    ranks = parallel.start(recipe.parallel.shard)
    config = check_recipe(recipe, ranks.world)
    out = Path(recipe.out)
    if not ranks.first:
        return _train(recipe, config, out, ranks, None, None, None)
    with lock_folder(out):
        return _train(recipe, config, out, ranks, on_step, on_begin, on_evaluate)


def _train(
    recipe: Recipe,
    config: ModelConfig,
    out: Path,
    ranks: Ranks,
    on_step: Callable[[dict[str, Any]], None] | None,
    on_begin: Callable[[LlamaLM, Tokenizer], None] | None,
    on_evaluate: Callable[[dict[str, float]], None] | None,
) -> tuple[Path, TrainResult]:
    parents: dict[str, str] = {}
    if ranks.first:  # the other ranks use the data that this one prepared
        parents = parent_hashes(recipe)
        bind_data(recipe, out, parents)
        prepare(recipe, config, out)
        bind_data(recipe, out, parents)  # refuses text that was edited while it was read
    ranks.barrier()
    tokenizer, data = prepare(recipe, config, out)
    if recipe.data.kind != "mix" and ranks.first:  # a mix warns for each of its sources
        warn_of_repeats(recipe.name, data.stream, recipe.train)
    model = build(recipe, config, ranks)
    if on_begin is not None:
        on_begin(model, tokenizer)

    def evaluate(now: LlamaLM, step: int) -> dict[str, float]:
        scores = {f"{kind}_accuracy": accuracy(now, rows) for kind, rows in data.probes.items()}
        if data.heldout:
            scores["heldout_loss"] = heldout_loss(now, data.heldout)
        if on_evaluate is not None:
            on_evaluate(scores)
        return scores

    rounding = None if recipe.rounding is None else recipe.rounding.build(model)
    whole = recipe.adapter is None or recipe.adapter.new_rows
    result = train(
        model,
        data.stream,
        objective_of(recipe, ranks),
        recipe.config,
        out,
        mesh=ranks.mesh,
        rounding=rounding,
        evaluate=evaluate if data.heldout or data.probes else None,
        on_step=on_step,
        result_nbytes=config.nbytes(torch_dtype(recipe.save_dtype).itemsize) if whole else 0,
    )
    lineage = None
    if ranks.first:
        lineage = Lineage(
            name=recipe.name,
            stage=recipe.objective.kind,
            parents=parents,
            recipe=recipe.model_dump(mode="json"),
            data_hash=data.hash,
        )
    if rounding is not None:
        content = FileContent(config, rounding.formats, rounding.rows, tokenizer, recipe.name)
        write_gguf_folder(out / "model", content, lambda: lineage)
    elif recipe.adapter is not None and recipe.adapter.new_rows:
        dtype = torch_dtype(recipe.save_dtype)
        write_checkpoint(
            out / "model", config, partial(merged_parameter, model), tokenizer, dtype=dtype, lineage=lineage
        )
    elif recipe.adapter is not None:
        base = str(recipe.model.start)
        name = str(Path(base).resolve()) if Path(base).exists() else base
        rslora = recipe.adapter.rslora
        save_adapter(out / "adapter", model, name, tokenizer, rslora=rslora, lineage=lineage)
        return out / "adapter", result
    else:
        _save(recipe, config, model, tokenizer, lineage, out / "model", ranks)
    return out / "model", result


# The data ---------------------------------------------------------------------------------------------------


def parent_hashes(recipe: Recipe) -> dict[str, str]:
    """Return the hash of the weights of every model that the run reads, by its role. Reads all of them."""
    sources = {"start": recipe.model.start, **recipe.objective.parents()}
    return {role: checkpoint_hash(source) for role, source in sources.items() if source is not None}


def bind_data(recipe: Recipe, out: Path, parents: dict[str, str] | None = None) -> None:
    """Tie what is under ``out`` to the content of its sources, its parents and the settings it depends on.

    ``parents`` are those of `parent_hashes`, which are computed if they are not given.
    Raises `DataError` for changes since the data was prepared: an edited file, another tokenizer, ...
    """
    spec = recipe.tokenizer
    parents = parent_hashes(recipe) if parents is None else parents
    files, settings = recipe.data.origin()
    settings |= {
        "data.kind": recipe.data.kind,
        "train.seed": recipe.train.seed,
        "tokenizer.train_vocab": spec.train_vocab if spec is not None else None,
        "model.init_std": recipe.model.init_std,
        **{f"the {role} model (SHA-256)": digest for role, digest in parents.items()},
    }
    if recipe.adapter is not None:
        settings["adapter"] = recipe.adapter.model_dump(mode="json")
    if spec is None or spec.train_vocab is None:
        settings["tokenizer (SHA-256)"] = _tokenizer(recipe, out).sha256
    bind(
        out,
        files,
        settings,
        prepared=[out / name for name in PREPARED],
        cure=f"Restore it, choose another 'out', or remove {out} to start from the beginning",
    )


def prepare(recipe: Recipe, config: ModelConfig, out: Path) -> tuple[Tokenizer, OpenedData]:
    """Return the tokenizer and the data.

    Shards and a new tokenizer are written to ``out`` unless they are there.
    """
    tokenizer = _tokenizer(recipe, out)
    if tokenizer.vocab_size > config.vocab_size:
        raise RecipeError(
            f"{recipe.name}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary is "
            f"{config.vocab_size}: they do not belong together"
        )
    data = recipe.data.open(tokenizer, out, recipe.train)
    data.stream.signature = {"data": data.hash, "seed": recipe.train.seed}  # type: ignore[attr-defined]
    return tokenizer, data


def _tokenizer(recipe: Recipe, out: Path) -> Tokenizer:
    spec = recipe.tokenizer
    if spec is None:
        tokenizer = load_tokenizer(str(recipe.model.start))
        if tokenizer is None:
            raise RecipeError(f"{recipe.name}: {recipe.model.start} has no tokenizer; give tokenizer.path")
        return tokenizer
    if spec.path is not None:
        return Tokenizer.from_file(spec.path)
    folder = out / "tokenizer"
    if not (folder / "tokenizer.model").exists():
        tokenizer = Tokenizer.train(recipe.data.texts(), int(spec.train_vocab or 0))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    return Tokenizer.from_folder(folder)


# The model --------------------------------------------------------------------------------------------------


def build(recipe: Recipe, config: ModelConfig, ranks: Ranks) -> LlamaLM:
    """Return the recipe's model with fp32 weights, on this rank's device, divided over the ranks.

    With adapters only these are fp32 and trained.
    """
    source = recipe.model.start
    compute, std = torch_dtype(recipe.train.dtype), recipe.model.init_std
    if recipe.adapter is not None:
        return recipe.adapter.load(str(source), recipe.train.seed, compute, parallel.device_of_rank())
    return spread(config, source, recipe.train.seed, ranks, compute, torch.float32, std)


def spread(
    config: ModelConfig,
    source: str | None,
    seed: int,
    ranks: Ranks,
    compute: torch.dtype,
    dtype: torch.dtype,
    std: float = 0.02,
) -> LlamaLM:
    """Return a model in ``dtype`` from the checkpoint ``source``, or drawn from ``seed`` if that is None.

    ``std`` is the deviation of drawn weights.

    With several shards no rank ever has the whole model: parameters are allocated sharded and filled one by
    one.
    """
    device = parallel.device_of_rank()
    if ranks.mesh is None or config.tie_embeddings:  # tied weights must be one tensor before it is sharded
        if source is not None:
            model = _with_config(load_trainable(source, dtype, device), config)
        else:
            model = LlamaLM(config).init_weights(seed, std).to(device, dtype)
        return parallel.distribute(model, ranks, compute)
    model = LlamaLM.on_meta(config).to(dtype)
    parallel.distribute(model, ranks, compute)
    model.to_empty(device=device)
    if source is None:
        return model.init_weights(seed, std)
    params = dict(model.named_parameters())
    with torch.no_grad():
        read = weight_reader(source)
        for name, _ in config.param_shapes():
            fill_parameter(params[name], read(name, dtype))
    return model


def _with_config(model: LlamaLM, config: ModelConfig) -> LlamaLM:
    """Return the same weights in a model of ``config``, which may have another context."""
    if model.config == config:
        return model
    other = LlamaLM(config).to(model.device, next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other


def objective_of(recipe: Recipe, ranks: Ranks) -> Objective:
    """Return the recipe's objective.

    A teacher is frozen, in the compute dtype, and divided over the ranks like the model.
    """
    compute = torch_dtype(recipe.train.dtype)

    def load_frozen(source: str) -> LlamaLM:
        return spread(load_config(source), source, 0, ranks, compute, compute).requires_grad_(False)

    return recipe.objective.build(load_frozen)


def _save(
    recipe: Recipe,
    config: ModelConfig,
    model: LlamaLM,
    tokenizer: Tokenizer,
    lineage: Lineage | None,
    folder: Path,
    ranks: Ranks,
) -> None:
    """Write the result as a checkpoint folder with its lineage.

    Sharded weights are gathered tensor by tensor.
    """
    params = dict(model.named_parameters())

    def whole(name: str) -> Tensor:
        value = params[name].detach()
        return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()

    if not ranks.first:  # gathering is a collective: take part, tensor by tensor, in the order of the file
        for name, _ in config.param_shapes():
            if isinstance(params[name], DTensor):
                whole(name)
        ranks.barrier()
        return
    write_checkpoint(folder, config, whole, tokenizer, dtype=torch_dtype(recipe.save_dtype), lineage=lineage)
    ranks.barrier()
