"""Code that the verbs of `herd plan` share: numeric options, machines, and parts of the printed results."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..plan import quantity
from ..plan.profile import SECONDS
from ..plan.quantity import CONTEXT, COUNT, USD, Quantity
from .common import MODEL, picked, print_table, progress_display

if TYPE_CHECKING:
    from ..llama.config import ModelConfig
    from ..plan.ways import MeasuredTarget, Target, Way

Number = Any
"""Type of a numeric option. Its default is a text as users would type it: 15.6T."""


def number(kind: Quantity, help: str, *names: str) -> Any:
    """Return an option that is parsed as a quantity of this kind."""

    def read(parameter: typer.CallbackParam, text: str | None) -> float | None:
        return None if text is None else kind.parse(text, parameter.opts[0])

    return typer.Option(*names, parser=str, callback=read, metavar="NUMBER", help=help)


def count(help: str, most: float, suffixes: Mapping[str, int] = COUNT) -> Any:
    """Return an option for a whole number of at least 1."""
    return number(quantity.whole(most, suffixes), help)


class PlannedModel(NamedTuple):
    """A model to plan for: the name that a user types for it, and its shape."""

    name: str
    config: ModelConfig


def model(text: str) -> PlannedModel:
    """Return the model that a user names: a published size, or anything whose configuration can be read."""
    from ..checkpoint.model_source import config_without_weights
    from ..llama.config import SIZES

    size = re.sub(r"^llama3\.[12]-|-bf16$", "", text.strip().lower()).upper()
    return (
        PlannedModel(size, SIZES[size]) if size in SIZES else PlannedModel(text, config_without_weights(text))
    )


def model_option(help: str, *names: str) -> Any:
    return typer.Option(*names, parser=model, metavar="MODEL", help=help)


ANY_MODEL = "405B, 70B, 8B, 3B, 1B, or any model, whose weights are not needed. " + MODEL
MAX_TOKENS = 1e18  # far more than all text that exists
Size = Annotated[Any, model_option(ANY_MODEL, "--size", "--model")]
"""A `PlannedModel`."""
Where = Annotated[
    str, typer.Option("--machine", help="here (measured), or a number of devices: 2xRTX4090, M2Ultra-192GB.")
]
Machines = Annotated[Path | None, typer.Option("--machines", help="A file of your own machines (YAML).")]
Context = Annotated[
    Number, count("Tokens per sequence: 8192, 32k (default: 8192, or the model's).", 2**40, CONTEXT)
]
UsdPerHour = Annotated[Number, number(USD, "Rent of one device per hour in USD (default: the catalogue's).")]
Learned = Annotated[
    bool,
    typer.Option(
        "--learned",
        help="Correct predictions by this machine's earlier runs (default: off; see herd plan score).",
    ),
]


def measured_target(learned: bool = False, again: bool = False) -> MeasuredTarget:
    """Return this machine from its saved profile, or measure it now."""
    from ..machine import available_memory
    from ..plan.profile import load_profile, save_profile
    from ..plan.score import learned_factors
    from ..plan.ways import MeasuredTarget

    profile = None if again else load_profile()
    if profile is None:
        profile = _measure_with_progress()
        save_profile(profile)
    factors = learned_factors(profile.key) if learned else {}
    return MeasuredTarget(profile, available_memory(), factors)


def _measure_with_progress() -> Any:
    from rich.progress import SpinnerColumn, TimeElapsedColumn

    print(f"Measuring this machine, once (about {SECONDS} s). The result is stored.", file=sys.stderr)
    with progress_display(SpinnerColumn(), "{task.description}", TimeElapsedColumn()) as bar:
        task = bar.add_task("loading torch", total=None)
        from ..plan.measure import measure_machine

        return measure_machine(lambda what: bar.update(task, description=what))


def find_target(name: str, machines: Path | None, config: ModelConfig, learned: bool = False) -> Target:
    """Return the machine with this name as a target for running a model."""
    from ..plan.machines import find_machine
    from ..plan.ways import catalogue_target

    if name == "here":
        return measured_target(learned)
    return catalogue_target(find_machine(name, machines), config)


def usual_context(asked: int | None, *models: PlannedModel) -> int:
    """Return the context that is asked for, or 8,192 tokens as far as the models have them."""
    return asked or min(8192, *(each.config.max_context for each in models))


def way_record(name: str, way: Way) -> dict[str, Any]:
    return {"size": name} | picked(
        way,
        "weights=weights.name kv context batch weights_bytes=weights_nbytes kv_bytes=kv_nbytes "
        "working_bytes=working_nbytes resident_bytes=resident capacity_bytes=capacity fits ttft_seconds=ttft "
        "tokens_per_s kld_published=weights.kld",
    )


def print_rows(header: str, rows: Iterable[str]) -> None:
    """Print a table of rows whose cells are separated by ``|``."""
    print_table(header.split("|"), [row.split("|") for row in rows])


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
