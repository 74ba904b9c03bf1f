"""The options of a tuning run. They are stored in its folder, so that only the same run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ..errors import RecipeError
from ..files import write_json
from ..train.section import Positive, PositiveReal, Section

FILE = "options.json"


class TuneOptions(Section):
    """Options of a tuning run. Herd chooses those that are None."""

    model: str
    data: tuple[str, ...]
    out: str
    method: Literal["auto", "full", "lora", "qlora"] = "auto"
    objective: Literal["auto", "sft", "dpo"] = "auto"
    rank: Positive = 16
    rslora: bool = False
    dora: bool = False
    lr: PositiveReal | None = None
    steps: Positive | None = None
    tokens: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    context: Positive | None = None
    heldout: str | None = None
    replay: tuple[str, ...] = ()
    replay_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    beta: PositiveReal = 0.1
    tasks: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    seed: int = 0

    def store(self) -> None:
        """Write the options into ``out``."""
        write_json(Path(self.out) / FILE, self.model_dump(mode="json"))

    def require_same(self) -> None:
        """Raise `RecipeError` naming the first difference from the options of the run in ``out``."""
        stored = stored_options(Path(self.out))
        if stored is None:
            raise RecipeError(f"{self.out}/{FILE} is missing; restore it, or give another --out")
        then = stored.model_dump(mode="json")
        for name, value in self.model_dump(mode="json").items():
            if then[name] != value:
                raise RecipeError(
                    f"{self.out} has a run with {name}={then[name]!r}, not {value!r}: give the same options "
                    "to resume it, or another --out"
                )


def stored_options(folder: Path) -> TuneOptions | None:
    """Return the options of the run in a folder, or None if there is no run.

    Raises `RecipeError` if the file is not one of herd tune.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return TuneOptions.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RecipeError(f"{path}: is not from herd tune; restore it, or give another folder") from error
