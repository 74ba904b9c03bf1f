"""The options of a tuning run. They are stored in its folder, so that only the same run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import RecipeError
from ..files import write_json
from ..train.section import Fraction, Positive, PositiveReal, Section

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
    epochs: PositiveReal | None = None
    context: Positive | None = None
    heldout: str | None = None
    replay: tuple[str, ...] = ()
    replay_share: Fraction = 0.2
    beta: PositiveReal = 0.1
    tasks: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    seed: int = 0

    def store(self) -> None:
        """Write the options into ``out``."""
        path = Path(self.out) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.model_dump(mode="json"))

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
    """Return the options of the run in a folder, or None if there is no run."""
    path = folder / FILE
    if not path.is_file():
        return None
    return TuneOptions.model_validate_json(path.read_text(encoding="utf-8"))
