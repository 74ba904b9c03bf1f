"""A recipe: one YAML file that says everything about a training run, checked before anything starts. No torch.

Every error names the file, the line and the key. An unknown key comes with the nearest known one, because a misspelt
key that is quietly ignored costs a training run. `read_recipe` checks what the file alone can tell (types, impossible
combinations); `check` then looks at the folders it names and at the number of ranks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from ..data.text_files import expand_paths
from ..errors import ConfigError, DataError, RecipeError
from ..llama.config import SIZES, ModelConfig, RopeScaling
from .config import ComputeDtype, Fraction, Positive, PositiveReal, TrainConfig, impossible

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


def _mirror(source: type, **replaced: Any) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass, so that YAML errors are found key by key."""
    hints = typing.get_type_hints(source)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(source):
        default = ... if field.default is dataclasses.MISSING else field.default
        fields[field.name] = (replaced.get(field.name, hints[field.name]), default)
    return create_model(source.__name__ + "Spec", __config__=_STRICT, **fields)


RopeSpec = _mirror(RopeScaling)
ShapeSpec = _mirror(ModelConfig, rope_scaling=RopeSpec | None)


class ModelSpec(BaseModel):
    """Where the weights come from; exactly one of the three. With ``size`` and ``shape`` they are drawn at random."""

    model_config = _STRICT

    size: str | None = None  # of the published table
    shape: ShapeSpec | None = None  # type: ignore[valid-type]
    start: str | None = None  # a checkpoint folder

    @model_validator(mode="after")
    def _one(self) -> ModelSpec:
        given = [name for name in ("size", "shape", "start") if getattr(self, name) is not None]
        if len(given) != 1:
            raise impossible(
                given[-1] if given else "", f"give one of size, shape or start, not {len(given)} of them"
            )
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
        """The model's shape, where the recipe alone tells it."""
        if self.size is not None:
            return SIZES[self.size]
        if self.shape is None:
            return None
        fields = dict(self.shape)
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**dict(fields["rope_scaling"]))
        return ModelConfig(**fields)


class TokenizerSpec(BaseModel):
    """A tokenizer's file or folder, or the size of one to train on the corpus. Neither: the checkpoint's own."""

    model_config = _STRICT

    path: str | None = None
    train_vocab: Annotated[int, Field(ge=512)] | None = (
        None  # with the 256 single bytes and 256 special tokens
    )

    @model_validator(mode="after")
    def _one(self) -> TokenizerSpec:
        if (self.path is None) == (self.train_vocab is None):
            raise impossible("path" if self.path else "", "give one of path or train_vocab")
        return self


class DataSpec(BaseModel):
    """What is read: ready-made ``shards``, or ``text`` to make them of, or ``dialogs``."""

    model_config = _STRICT

    shards: str | None = None
    text: Annotated[list[str], Field(min_length=1)] | None = (
        None  # files, folders, hf:NAME; [builtin]: Python's own
    )
    split: Literal["teacher", "student"] = (
        "teacher"  # which part of the text; the rest of it is another model's
    )
    max_bytes: Positive | None = None  # of text
    dialogs: str | None = (
        None  # a .jsonl file: {"messages": [...], "tools": [...], "tool_call_format": "json"} a line
    )
    made_dialogs: Positive | None = None  # that many, made by program and verified
    heldout: str | None = None  # shards, or a .jsonl file of dialogs, to evaluate on; text has its own
    heldout_rows: Positive = 64
    documents: bool = False  # attention stays within a document

    @model_validator(mode="after")
    def _one(self) -> DataSpec:
        names = ("shards", "text", "dialogs", "made_dialogs")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise impossible(
                given[-1] if given else "", f"give one of {', '.join(names)}, not {len(given)} of them"
            )
        if self.text is None:
            for name in ("max_bytes", "split"):
                if name in self.model_fields_set:
                    raise impossible(name, f"{name} is for text; the data here is {given[0]}")
        return self

    @property
    def is_dialogs(self) -> bool:
        """Whether rows are packed dialogs rather than running text."""
        return self.dialogs is not None or self.made_dialogs is not None

    @property
    def has_heldout(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.heldout is not None or self.text is not None or self.made_dialogs is not None


class ObjectiveSpec(BaseModel):
    """What is minimized. ``teacher`` (a checkpoint folder), ``kl_weight`` and ``tau`` belong to ``distil``."""

    model_config = _STRICT

    kind: Literal["lm", "sft", "distil"]
    teacher: str | None = None
    kl_weight: Fraction = 1.0
    tau: PositiveReal = 1.0

    @model_validator(mode="after")
    def _fits(self) -> ObjectiveSpec:
        if self.kind == "distil" and self.teacher is None:
            raise impossible("kind", "distil needs a teacher: give the folder of its checkpoint")
        if self.kind != "distil":
            for name in ("teacher", "kl_weight", "tau"):
                if name in self.model_fields_set:
                    raise impossible(name, f"{name} is for distil, the objective here is {self.kind}")
        return self


class ParallelSpec(BaseModel):
    """How many processes, and over how many of them weights are split: 1 is DDP, all are FSDP, between them HSDP."""

    model_config = _STRICT

    ranks: Positive = 1
    shard: Positive = 1

    @model_validator(mode="after")
    def _divides(self) -> ParallelSpec:
        if self.ranks % self.shard:
            raise impossible("shard", f"shard={self.shard} does not divide ranks={self.ranks}")
        return self


class Recipe(BaseModel):
    """One run. ``out`` receives state, metrics and, at the end, the checkpoint ``out/model``."""

    model_config = _STRICT

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]
    model: ModelSpec
    tokenizer: TokenizerSpec | None = None
    data: DataSpec
    objective: ObjectiveSpec
    train: TrainConfig
    parallel: ParallelSpec = ParallelSpec()
    save_dtype: ComputeDtype = "bf16"  # of the checkpoint; what Llama is released in
    out: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        config = self.model.config()
        if config is not None:
            if self.train.context > config.max_context:
                raise impossible(
                    "train.context",
                    f"context={self.train.context} exceeds the model's max_context={config.max_context}",
                )
            if self.tokenizer is None:
                raise impossible(
                    "model", "random weights come without a tokenizer: give tokenizer.path or train_vocab"
                )
            vocab = self.tokenizer.train_vocab
            if vocab is not None and vocab != config.vocab_size:
                raise impossible(
                    "tokenizer.train_vocab",
                    f"train_vocab={vocab} is not the model's vocab_size={config.vocab_size}",
                )
        elif self.tokenizer is not None and self.tokenizer.train_vocab is not None:
            raise impossible(
                "tokenizer.train_vocab", "a new tokenizer does not fit the weights of model.start"
            )
        if self.tokenizer is not None and self.tokenizer.train_vocab is not None and self.data.text is None:
            raise impossible(
                "tokenizer.train_vocab", "a tokenizer is trained on data.text, which is not given"
            )
        if (self.objective.kind == "sft") != self.data.is_dialogs and self.objective.kind != "distil":
            what = "dialogs or made_dialogs" if self.objective.kind == "sft" else "shards or text"
            raise impossible("objective.kind", f"objective {self.objective.kind} reads {what}")
        if self.train.eval_every and not self.data.has_heldout:
            raise impossible("train.eval_every", "eval_every needs data.heldout to evaluate on")
        try:
            self.train.rows_of_rank(self.parallel.ranks)
        except ValueError as error:
            field = "micro_batch_size" if str(error).startswith("micro_batch_size") else "batch_size"
            raise impossible(f"train.{field}", str(error)) from error
        return self


# Reading YAML with lines --------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML reads 3e-4 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)

RENAMED: dict[str | int, str] = {
    "batch_rows": "batch_size",
    "micro_rows": "micro_batch_size",
    "anneal_steps": "decay_steps",
    "remat": "activation_checkpointing",
}
"""Keys of earlier recipes, which are refused with their new names."""

Path_ = tuple[str | int, ...]


def read_recipe(path: Path | str) -> Recipe:
    """The checked recipe in a YAML file. Raises `RecipeError`: ``FILE:LINE: what is wrong``."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read ({reason}); give the path of a recipe") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """The checked recipe in a YAML text; ``where`` names it in errors."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path_, int] = {}
        _mark(node, (), lines, where)
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise RecipeError(f"{where}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {error}".splitlines()[0]) from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise RecipeError(f"{where}:1: a recipe is a mapping of keys, not {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # What is missing comes last: mostly it is what an unknown key was meant to be.
        problems = sorted(
            (detail["type"] == "missing", *_problem(detail, lines)) for detail in error.errors()
        )
        _, line, message = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecipeError(f"{where}:{line}: {message}{more}") from error


def _mark(node: Any, at: Path_, lines: dict[Path_, int], where: str) -> None:
    """Note the line of every key; a key given twice is an error, not a silent choice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, key.value)
            if inner in lines:
                raise RecipeError(f"{where}:{key.start_mark.line + 1}: {_dotted(inner)} is given twice")
            lines[inner] = key.start_mark.line + 1
            _mark(value, inner, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _mark(value, (*at, index), lines, where)


def _problem(detail: ErrorDetails, lines: dict[Path_, int]) -> tuple[int, str]:
    """Line and text of one of pydantic's complaints."""
    at: Path_ = tuple(
        part for part in detail["loc"] if isinstance(part, int) or ("[" not in part and "literal" not in part)
    )
    if detail["type"] == "impossible":
        context = detail["ctx"]
        at = (*at, *(part for part in context["field"].split(".") if part))
        return _line(at, lines), context["reason"]
    if detail["type"] == "extra_forbidden":
        if at[-1] in RENAMED:
            return _line(at, lines), f"{_dotted(at)} is now called {_dotted((*at[:-1], RENAMED[at[-1]]))}"
        known = _keys(at[:-1])
        near = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return _line(at, lines), f"{_dotted(at)} is not a key; {hint}"
    if detail["type"] == "missing":
        return _line(at, lines), f"{_dotted(at)} is missing"
    said = detail["msg"][0].lower() + detail["msg"][1:]
    return _line(at, lines), f"{_dotted(at)}={detail['input']!r}: {said}"


def _line(at: Path_, lines: dict[Path_, int]) -> int:
    """Line of a key, or of the nearest one around it."""
    while at and at not in lines:
        at = at[:-1]
    return lines.get(at, 1)


def _keys(at: Path_) -> list[str]:
    """The keys that exist at a place of a recipe."""
    model: Any = Recipe
    for part in at:
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *typing.get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def _dotted(at: Path_) -> str:
    return ".".join(str(part) for part in at)


# What the disk and the machine must say too -------------------------------------------------------------------------


def check(recipe: Recipe, world: int) -> ModelConfig:
    """Refuse, before anything is allocated, folders that do not exist, vocabularies that differ and a wrong number of
    ranks. Returns the model's shape. Raises `RecipeError`, or what reading a checkpoint's configuration raises."""
    from ..checkpoint import load_config  # imports torch

    if world != recipe.parallel.ranks:
        raise RecipeError(
            f"{recipe.name}: the recipe is for parallel.ranks={recipe.parallel.ranks}, started are {world}: "
            f"use torchrun --nproc-per-node={recipe.parallel.ranks}"
        )
    config = recipe.model.config()
    if config is None:
        config = load_config(str(recipe.model.start))
        if recipe.train.context > config.max_context:
            raise RecipeError(
                f"{recipe.name}: train.context={recipe.train.context} exceeds the max_context={config.max_context} of "
                f"{recipe.model.start}"
            )
    if recipe.objective.teacher is not None:
        teacher = load_config(recipe.objective.teacher)
        if teacher.vocab_size != config.vocab_size:
            raise RecipeError(
                f"{recipe.name}: the model's vocabulary is {config.vocab_size}, its teacher's {teacher.vocab_size}: "
                "distillation needs one vocabulary"
            )
        if recipe.train.context > teacher.max_context:
            raise RecipeError(
                f"{recipe.name}: train.context={recipe.train.context} exceeds the teacher's "
                f"max_context={teacher.max_context}"
            )
    data = recipe.data
    text = [] if data.text in (None, ["builtin"]) else data.text or []
    for path in (data.shards, data.dialogs, data.heldout, *text):
        if path is not None and not path.startswith("hf:"):
            try:
                expand_paths(path)
            except DataError as error:
                raise RecipeError(f"{recipe.name}: {error}") from error
    return config


def epochs(recipe: Recipe, n_rows: int) -> float:
    """How often the run reads a stream of ``n_rows`` rows."""
    return recipe.train.steps * recipe.train.batch_size / n_rows if n_rows else math.inf
