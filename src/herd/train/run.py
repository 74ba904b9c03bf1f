"""A recipe, done: the model it names, the stream it names, the loop, and a checkpoint folder at the end.

Everything that can be refused is refused before weights are allocated. Shards and a trained tokenizer are made once,
by the first rank, under ``out``; starting again finds them, and the loop goes on from its newest state.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoint import (
    Lineage,
    checkpoint_hash,
    load_config,
    load_model,
    load_tokenizer,
    resolve_folder,
    weights,
    write_checkpoint,
)
from ..data.batch import Batch
from ..data.corpus import DataWarning, corpus_origin, load_corpus
from ..data.dialogs import make_dialogs
from ..data.origin import bind
from ..data.packing import DialogStream
from ..data.read_dialogs import rendered_dialogs
from ..data.shards import INDEX, Shards
from ..data.stream import Stream, TokenStream, first_rows
from ..data.text_files import expand_paths
from ..dtypes import torch_dtype
from ..errors import RecipeError
from ..files import storage_error
from ..llama.config import ModelConfig
from ..llama.fill import fill_parameter
from ..llama.model import LlamaLM
from ..machine import lock_folder
from ..text import Tokenizer, render
from . import parallel
from .heldout import heldout_loss
from .loop import TrainResult, train
from .objectives import Objective, distil, lm, sft
from .parallel import Ranks
from .recipe import Recipe, check, epochs


@dataclass(frozen=True)
class Material:
    """What a run reads. ``hash`` names the data in states and lineage."""

    tokenizer: Tokenizer
    stream: Stream
    heldout: list[Batch]
    hash: str


def run_recipe(
    recipe: Recipe, *, on_step: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Path, TrainResult]:
    """Train as the recipe says, on as many processes as ``torchrun`` started. Returns the checkpoint folder.

    Raises `HerdError` of the room whose input is wrong; KeyboardInterrupt after Ctrl-C, with the state saved.
    """
    ranks = parallel.start(recipe.parallel.shard)
    config = check(recipe, ranks.world)
    out = Path(recipe.out)
    if not ranks.first:
        return _train(recipe, config, out, ranks, on_step)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(out, error) from error
    with lock_folder(out):
        return _train(recipe, config, out, ranks, on_step)


def _train(
    recipe: Recipe,
    config: ModelConfig,
    out: Path,
    ranks: Ranks,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> tuple[Path, TrainResult]:
    if ranks.first:  # the others find what this one made
        bind_data(recipe, out)
        prepare(recipe, config, out)
        bind_data(recipe, out)  # refuses text that was edited while it was read
    ranks.barrier()
    material = prepare(recipe, config, out)
    if (passes := epochs(recipe, material.stream.n_rows)) > 1 and ranks.first:
        warnings.warn(f"{recipe.name}: the data is read {passes:.1f} times", DataWarning, stacklevel=2)
    model = build(recipe, config, ranks)
    objective = objective_of(recipe, ranks)

    def evaluate(now: LlamaLM, step: int) -> dict[str, float]:
        return {"heldout_loss": heldout_loss(now, material.heldout)}

    result = train(
        model, material.stream, objective, recipe.train, out, mesh=ranks.mesh,
        evaluate=evaluate if material.heldout else None, on_step=on_step,
    )  # fmt: skip
    folder = out / "model"
    _save(recipe, config, model, material, folder, ranks)
    return folder, result


# The data -----------------------------------------------------------------------------------------------------------


def bind_data(recipe: Recipe, out: Path) -> None:
    """Tie the data under ``out`` to the content of its sources and the settings it depends on.

    Raises `DataError` naming what changed since the data was prepared: an edited file, another tokenizer, ...
    """
    data, spec = recipe.data, recipe.tokenizer
    settings: dict[str, Any] = {
        "train.seed": recipe.train.seed,
        "data.documents": data.documents,
        "data.made_dialogs": data.made_dialogs,
        "tokenizer.train_vocab": spec.train_vocab if spec is not None else None,
    }
    if spec is None or spec.train_vocab is None:
        settings["tokenizer (SHA-256)"] = _tokenizer(recipe, out).sha256
    files: list[tuple[str, Path]] = []
    if data.text is not None:
        files, text_settings = corpus_origin(_corpus_spec(recipe))
        settings |= text_settings | {"data.split": data.split, "data.max_bytes": data.max_bytes}
    for name in (data.shards, data.dialogs, data.heldout):
        for path in expand_paths(name) if name is not None else []:
            if path.is_dir():  # the index of shards holds the checksums of the other files
                files.append((f"{path.name}/{INDEX}", path / INDEX))
            else:
                files.append((path.name, path))
    bind(
        out,
        files,
        settings,
        prepared=[out / name for name in ("tokenizer", "shards", "state", "model")],
        cure=f"Restore it, choose another 'out', or remove {out} to start from the beginning",
    )


def prepare(recipe: Recipe, config: ModelConfig, out: Path) -> Material:
    """The tokenizer and the streams; shards and a new tokenizer are written under ``out`` unless they are there."""
    data, context, seed = recipe.data, recipe.train.context, recipe.train.seed
    tokenizer = _tokenizer(recipe, out)
    if tokenizer.vocab_size > config.vocab_size:
        raise RecipeError(
            f"{recipe.name}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary is "
            f"{config.vocab_size}: they do not belong together"
        )
    if data.is_dialogs:
        return _dialogs(recipe, tokenizer)
    made = data.shards is None
    shards = (
        _text_shards(recipe, tokenizer, out, data.split)
        if made
        else Shards.open(expand_paths(str(data.shards))[0], tokenizer)
    )
    stream = TokenStream(shards, context, seed, documents=data.documents)
    heldout = None
    if data.heldout is not None:
        heldout = Shards.open(expand_paths(data.heldout)[0], tokenizer)
    elif made:
        heldout = _text_shards(recipe, tokenizer, out, "heldout")
    batches = [] if heldout is None else _first_rows(TokenStream(heldout, context, 0), recipe)
    return _signed(Material(tokenizer, stream, batches, str(shards.index["sha256"])), seed)


def _tokenizer(recipe: Recipe, out: Path) -> Tokenizer:
    spec = recipe.tokenizer
    if spec is None:
        tokenizer = load_tokenizer(str(recipe.model.start))
        if tokenizer is None:
            raise RecipeError(f"{recipe.name}: {recipe.model.start} has no tokenizer; give tokenizer.path")
        return tokenizer
    if spec.path is not None:
        path = Path(spec.path)
        return (load_tokenizer(path) if path.is_dir() else None) or Tokenizer.from_file(path)
    folder = out / "tokenizer"
    if not (folder / "tokenizer.model").exists():
        texts = (document.text for document in _corpus(recipe).splits[recipe.data.split])
        tokenizer = Tokenizer.train(texts, int(spec.train_vocab or 0))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    return Tokenizer.from_folder(folder)


def _corpus(recipe: Recipe) -> Any:
    return load_corpus(_corpus_spec(recipe), max_bytes=recipe.data.max_bytes)


def _corpus_spec(recipe: Recipe) -> list[str] | None:
    return None if recipe.data.text == ["builtin"] else recipe.data.text


def _text_shards(recipe: Recipe, tokenizer: Tokenizer, out: Path, split: str) -> Shards:
    folder = out / "shards" / split
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        Shards.write(folder, _corpus(recipe).splits[split], tokenizer)
    return Shards.open(folder, tokenizer)


def _dialogs(recipe: Recipe, tokenizer: Tokenizer) -> Material:
    tokenizer.require_chat_format()
    data, context, seed = recipe.data, recipe.train.context, recipe.train.seed
    if data.dialogs is not None:
        rendered = list(rendered_dialogs(data.dialogs, tokenizer))
        heldout = list(rendered_dialogs(data.heldout, tokenizer)) if data.heldout is not None else []
    else:
        made = {split: make_dialogs(n, seed, split=split) for split, n in _numbers(recipe)}
        rendered, heldout = (
            [
                render(d.messages, tokenizer, tools=d.tools or None, tool_call_format=d.tool_call_format)
                for d in made[split]
            ]
            for split in ("train", "test")
        )
    stream = DialogStream(rendered, context, seed, pad_id=tokenizer.pad_id)
    batches = []
    if heldout:
        batches = _first_rows(DialogStream(heldout, context, 0, pad_id=tokenizer.pad_id), recipe)
    return _signed(Material(tokenizer, stream, batches, _digest(rendered)), seed)


def _numbers(recipe: Recipe) -> list[tuple[str, int]]:
    n = int(recipe.data.made_dialogs or 0)
    return [("train", n), ("test", max(1, min(n, 4 * recipe.data.heldout_rows)))]


def _first_rows(stream: Stream, recipe: Recipe) -> list[Batch]:
    return first_rows(stream, recipe.data.heldout_rows, recipe.train.micro_batch_size or 8)


def _signed(material: Material, seed: int) -> Material:
    """The loop compares a stream's signature when it resumes."""
    material.stream.signature = {"data": material.hash, "seed": seed}  # type: ignore[attr-defined]
    return material


def _digest(rendered: list[Any]) -> str:
    digest = hashlib.sha256()
    for dialog in rendered:
        digest.update(json.dumps([dialog.ids, dialog.mask]).encode())
    return digest.hexdigest()


# The model ----------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, config: ModelConfig, ranks: Ranks) -> LlamaLM:
    """The recipe's model with fp32 weights, on this rank's device, spread over the ranks."""
    source = recipe.model.start
    return spread(config, source, recipe.train.seed, ranks, torch_dtype(recipe.train.dtype), torch.float32)


def spread(
    config: ModelConfig, source: str | None, seed: int, ranks: Ranks, compute: torch.dtype, dtype: torch.dtype
) -> LlamaLM:
    """A model from a checkpoint folder, or drawn from ``seed`` when there is none, kept in ``dtype``.

    Over several shards no rank ever holds it whole: parameters are allocated sharded and filled one tensor at a time.
    """
    device = parallel.device_of_rank()
    if ranks.mesh is None or config.tie_embeddings:  # tied tensors must be one before they are sharded
        if source is not None:
            model = load_model(source, dtype=dtype, device=device)
        else:
            model = LlamaLM(config).init_weights(seed).to(device, dtype)
        return parallel.distribute(model, ranks, compute)
    with torch.device("meta"):
        model = LlamaLM(config).to(dtype)
    parallel.distribute(model, ranks, compute)
    model.to_empty(device=device)
    if source is None:
        return model.init_weights(seed)
    folder = resolve_folder(source)
    wanted = weights.check_against(config, weights.read_index(folder), folder)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, info in wanted.items():
            fill_parameter(params[name], weights.read_tensor(info).to(dtype))
    return model


def objective_of(recipe: Recipe, ranks: Ranks) -> Objective:
    """The recipe's objective, its teacher loaded: frozen, in the compute dtype, sharded as the student is."""
    spec = recipe.objective
    if spec.kind != "distil":
        return {"lm": lm, "sft": sft}[spec.kind]
    source, compute = str(spec.teacher), torch_dtype(recipe.train.dtype)
    teacher = spread(load_config(source), source, 0, ranks, compute, compute)
    return distil(teacher.requires_grad_(False), kl_weight=spec.kl_weight, tau=spec.tau)


def _save(
    recipe: Recipe, config: ModelConfig, model: LlamaLM, material: Material, folder: Path, ranks: Ranks
) -> None:
    """The result as a checkpoint folder with its lineage. Sharded weights are gathered tensor by tensor."""
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
    sources = {"start": recipe.model.start, "teacher": recipe.objective.teacher}
    lineage = Lineage(
        name=recipe.name,
        stage=recipe.objective.kind,
        parents={role: checkpoint_hash(source) for role, source in sources.items() if source is not None},
        recipe=recipe.model_dump(mode="json"),
        data_hash=material.hash,
    )
    write_checkpoint(
        folder, config, whole, material.tokenizer, dtype=torch_dtype(recipe.save_dtype), lineage=lineage
    )
    ranks.barrier()
