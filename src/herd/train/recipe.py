"""A recipe: one YAML file that describes a training run and is checked before anything starts.

Every error is one line that names the file, the line and the key. For an unknown key it names the most
similar known key: a misspelt key that is silently ignored costs a training run. `read_recipe` checks the file
alone: types and impossible combinations. `check_recipe` then checks the folders that it names and the number
of ranks.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from ..data.corpus import require_unseen
from ..data.text_files import expand_paths
from ..errors import ConfigError, DataError, RecipeError
from ..llama.config import SIZES, ModelConfig, RopeScaling, extended
from .adapters import AdapterSection
from .config import TrainConfig, TrainSettings
from .objectives import AnyObjective
from .optimizers import AnyOptimizer
from .recipe_yaml import KeyPath, dotted, read_yaml
from .rounding import RoundingSection
from .schedules import AnySchedule, Cosine
from .section import ComputeDtype, Positive, PositiveReal, Section, UserPath, complaint, impossible
from .sources import AnyData


def _mirror(source: type, **replaced: Any) -> type[BaseModel]:
    """Return a pydantic model with the fields of a dataclass, so that YAML errors are found key by key."""
    hints = typing.get_type_hints(source)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(source):
        default = ... if field.default is dataclasses.MISSING else field.default
        fields[field.name] = (replaced.get(field.name, hints[field.name]), default)
    return create_model(source.__name__ + "Spec", __base__=Section, **fields)


RopeSpec = _mirror(RopeScaling)
ShapeSpec = _mirror(ModelConfig, rope_scaling=RopeSpec | None)


class ModelSpec(Section):
    """The source of the weights, exactly one of the three.

    With ``size`` and ``shape`` they are drawn at random.
    """

    size: str | None = None  # e.g. 8B: a published Llama 3.1 model's shape
    shape: ShapeSpec | None = None  # type: ignore[valid-type]
    start: str | None = None  # a checkpoint folder
    extend_to: Positive | None = None  # tokens: extend the context of start, by Llama 3's rotary scaling
    init_std: PositiveReal = 0.02  # of weights that are drawn at random

    @model_validator(mode="after")
    def _one(self) -> ModelSpec:
        given = [name for name in ("size", "shape", "start") if getattr(self, name) is not None]
        if len(given) != 1:
            raise impossible(
                given[-1] if given else "", f"give one of size, shape or start, not {len(given)} of them"
            )
        if self.extend_to is not None and self.start is None:
            raise impossible("extend_to", "extend_to needs start: only a trained model can be extended")
        if self.size is not None and self.size not in SIZES:
            raise impossible("size", f"size {self.size!r} is not one of {', '.join(SIZES)}")
        if self.shape is not None:
            try:
                self.config()
            except ConfigError as error:
                name = str(error).partition("=")[0]
                raise impossible(
                    f"shape.{name}" if name in ShapeSpec.model_fields else "shape", str(error)
                ) from error
        return self

    def config(self) -> ModelConfig | None:
        """Return the model's shape, or None if only the checkpoint has it."""
        if self.size is not None:
            return SIZES[self.size]
        if self.shape is None:
            return None
        fields = dict(self.shape)
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**dict(fields["rope_scaling"]))
        return ModelConfig(**fields)


class TokenizerSpec(Section):
    """A tokenizer's file or folder, or the size of one to train on the text."""

    path: UserPath | None = None
    train_vocab: Annotated[int, Field(ge=512)] | None = None  # 256 bytes and 256 special tokens included

    @model_validator(mode="after")
    def _one(self) -> TokenizerSpec:
        if (self.path is None) == (self.train_vocab is None):
            raise impossible("path" if self.path else "", "give one of path or train_vocab")
        return self


class ParallelSpec(Section):
    """The number of processes, and over how many of them weights are divided.

    A shard of 1 is DDP, of all processes FSDP, of some of them HSDP.
    """

    ranks: Positive = 1
    shard: Positive = 1

    @model_validator(mode="after")
    def _divides(self) -> ParallelSpec:
        if self.ranks % self.shard:
            raise impossible("shard", f"shard={self.shard} does not divide ranks={self.ranks}")
        return self


class Recipe(Section):
    """A training run. ``out`` receives state, metrics and the result: ``out/model``, or ``out/adapter``."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]
    model: ModelSpec
    tokenizer: TokenizerSpec | None = None
    adapter: AdapterSection | None = None  # train adapters on the model instead of its weights
    rounding: RoundingSection | None = None  # train the weights as a block format stores them
    data: AnyData
    objective: AnyObjective
    optimizer: AnyOptimizer
    schedule: AnySchedule = Cosine()
    train: TrainSettings
    parallel: ParallelSpec = ParallelSpec()
    save_dtype: ComputeDtype = "bf16"  # of the checkpoint
    out: UserPath

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        for key, message in self._contradictions():
            raise impossible(key, message)
        self.schedule.require_steps(self.train.steps)
        try:
            self.train.rows_of_rank(self.parallel.ranks)
        except ValueError as error:
            raise impossible(f"train.{str(error).partition('=')[0]}", str(error)) from error
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield key and message for sections that do not go together."""
        config, data, objective, train = self.model.config(), self.data, self.objective, self.train
        vocab = self.tokenizer.train_vocab if self.tokenizer is not None else None
        if config is not None:
            if train.context > config.max_context:
                limit = f"exceeds the model's max_context={config.max_context}"
                yield "train.context", f"context={train.context} {limit}"
            if self.tokenizer is None:
                yield "model", "random weights come without a tokenizer: give tokenizer.path or train_vocab"
            if vocab is not None and vocab != config.vocab_size:
                what = f"train_vocab={vocab} is not the model's vocab_size={config.vocab_size}"
                yield "tokenizer.train_vocab", what
        elif vocab is not None:
            yield "tokenizer.train_vocab", "a new tokenizer does not fit the weights of model.start"
        if vocab is not None and not data.has_text:
            yield "tokenizer.train_vocab", "a tokenizer is trained on data of kind text"
        if self.adapter is not None and self.model.start is None:
            yield "adapter", "adapters are trained on a model that exists: give model.start"
        if self.adapter is not None and self.parallel.ranks > 1:
            yield "parallel.ranks", f"adapters are trained in one process, not on ranks={self.parallel.ranks}"
        if self.rounding is not None:
            if self.adapter is not None:
                yield "rounding", "adapters are not rounded; merge them first, or leave out adapter"
            if self.model.start is None:
                yield "rounding", "rounding is for a model that is trained already: give model.start"
            if self.parallel.ranks > 1:
                yield (
                    "parallel.ranks",
                    f"weights are rounded in one process, not on ranks={self.parallel.ranks}",
                )
        mixable = data.rows == "mix" and objective.rows & {"text", "dialogs"}
        if data.rows not in objective.rows and not mixable:
            wanted = " or ".join(sorted(objective.rows))
            what = f"reads {wanted}; data of kind {data.kind} is {data.rows}"
            yield "objective.kind", f"objective {objective.kind} {what}"
        if train.eval_every and not data.has_heldout:
            yield "train.eval_every", "eval_every needs data.heldout to evaluate on"

    @property
    def config(self) -> TrainConfig:
        """The configuration that the loop is given."""
        return TrainConfig(**dict(self.train), optimizer=self.optimizer, schedule=self.schedule)


# Reading ----------------------------------------------------------------------------------------------------


def read_recipe(path: Path | str) -> Recipe:
    """Read and check the recipe in a YAML file. Raises `RecipeError`: ``FILE:LINE: problem``."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read ({reason}); give the path of a recipe") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Check the recipe in a YAML text. ``where`` is its name in errors."""
    data, lines = read_yaml(text, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where}:1: a recipe is a mapping of keys, not {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # Missing keys come last: an unknown key was mostly meant to be the missing one.
        problems = sorted(
            (detail["type"] == "missing", *_problem(detail, lines)) for detail in error.errors()
        )
        _, line, message = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecipeError(f"{where}:{line}: {message}{more}") from error


def _problem(detail: ErrorDetails, lines: dict[KeyPath, int]) -> tuple[int, str]:
    """Return line and text of one of pydantic's complaints."""
    loc, tag = _without_tags(detail["loc"])
    at: KeyPath = tuple(
        part for part in loc if isinstance(part, int) or ("[" not in part and "literal" not in part)
    )
    if detail["type"] == "impossible":
        context = detail["ctx"]
        at = (*at, *(part for part in context["field"].split(".") if part))
        return _line(at, lines), context["reason"]
    if detail["type"].startswith("union_tag"):
        kinds = detail["ctx"].get("expected_tags") or ", ".join(_kinds(str(at[0])))
        at = (*at, "kind")
        given = f"={detail['input']['kind']!r}: " if "kind" in detail["input"] else " is missing; "
        return _line(at, lines), f"{dotted(at)}{given}give one of {kinds}"
    if detail["type"] == "extra_forbidden":
        return _line(at, lines), f"{dotted(at)} is not a key; {_hint(at, tag)}"
    if detail["type"] == "missing":
        return _line(at, lines), f"{dotted(at)} is missing"
    return _line(at, lines), f"{dotted(at)}={detail['input']!r}: {complaint(detail)}"


def _hint(at: KeyPath, tag: str) -> str:
    """Return what to write instead of an unknown key: a similar one, or the same one of another section."""
    known, name = _keys(at[:-1], tag), str(at[-1])
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {near[0]}?"
    sections = [key for key, field in Recipe.model_fields.items() if _models(field.annotation)]
    if found := [other for other in sections if other != at[0] and name in _keys((other,), "")]:
        return f"did you mean {found[0]}.{name}?"
    return f"known are {', '.join(known)}"


def _without_tags(loc: KeyPath) -> tuple[KeyPath, str]:
    """Return a location without the kinds that pydantic names in it, and the last of these kinds."""
    tag = ""
    if loc[:1] in (("data",), ("objective",), ("schedule",)) and len(loc) > 1:
        tag, loc = str(loc[1]), loc[:1] + loc[2:]
    if loc[:2] == ("data", "mix") and len(loc) > 3:  # data.mix.0.copy.weight
        tag, loc = str(loc[3]), loc[:3] + loc[4:]
    return loc, tag


def _line(at: KeyPath, lines: dict[KeyPath, int]) -> int:
    """Return the line of a key, or of the nearest one around it."""
    while at and at not in lines:
        at = at[:-1]
    return lines.get(at, 1)


def _keys(at: KeyPath, tag: str) -> list[str]:
    """Return the keys that exist in a section of a recipe. ``tag`` is the kind of the section."""
    model: Any = Recipe
    for part in at[:1] if "mix" in at else at:
        options = _models(model.model_fields[str(part)].annotation)
        model = next((option for option in options if tag in _kind_of(option)), options[0])
    return list(model.model_fields)


def _kinds(section: str) -> list[str]:
    return [kind for model in _models(Recipe.model_fields[section].annotation) for kind in _kind_of(model)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    options = (annotation, *typing.get_args(annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _kind_of(model: type[BaseModel]) -> tuple[str, ...]:
    return typing.get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


# What the disk and the number of processes must agree with --------------------------------------------------


def start_config(spec: ModelSpec) -> ModelConfig:
    """Return the shape of the checkpoint that training starts from, extended to ``extend_to`` if given."""
    from ..checkpoint import load_config  # imports torch
    from ..checkpoint.adapter_config import refuse_adapter
    from ..checkpoint.sources import resolve_model

    refuse_adapter(resolve_model(str(spec.start)), "training")
    config = load_config(str(spec.start))
    return config if spec.extend_to is None else extended(config, spec.extend_to)


def check_recipe(recipe: Recipe, world: int) -> ModelConfig:
    """Check folders, vocabularies and the number of ranks ``world``. Return the model's shape.

    Raises `RecipeError`, or what reading a checkpoint's configuration raises, before anything is allocated.
    """
    from ..checkpoint import load_config  # imports torch

    if world != recipe.parallel.ranks:
        raise RecipeError(
            f"{recipe.name}: the recipe is for parallel.ranks={recipe.parallel.ranks}, started are {world}: "
            f"use torchrun --nproc-per-node={recipe.parallel.ranks}"
        )
    config = recipe.model.config()
    if config is None:
        config = start_config(recipe.model)
        if recipe.train.context > config.max_context:
            raise RecipeError(
                f"{recipe.name}: train.context={recipe.train.context} exceeds the "
                f"max_context={config.max_context} of {recipe.model.start}"
            )
    if recipe.rounding is not None:
        recipe.rounding.scheme(config)
    for role, folder in recipe.objective.parents().items():
        other = load_config(folder)
        if other.vocab_size != config.vocab_size:
            raise RecipeError(
                f"{recipe.name}: the model's vocabulary is {config.vocab_size}, its {role}'s "
                f"{other.vocab_size}: objective {recipe.objective.kind} needs one vocabulary"
            )
        if recipe.train.context > other.max_context:
            raise RecipeError(
                f"{recipe.name}: train.context={recipe.train.context} exceeds the {role}'s "
                f"max_context={other.max_context}"
            )
    there = next(path for path in (Path(recipe.out), *Path(recipe.out).absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RecipeError(f"{recipe.name}: out={recipe.out}: {there} is no folder that can be written")
    try:
        for path in recipe.data.paths_given():
            expand_paths(path)
        require_unseen(recipe.data.heldout_paths(), recipe.data.trained_paths())
    except DataError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error
    return config
