"""The options of a tuning run. They are stored in its folder, so that only the same run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

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

    def store(self) -> bool:
        """Write the options into ``out``, or compare them with the options of an earlier start.

        Returns whether there was one. Raises `RecipeError` naming the first difference.
        """
        path = Path(self.out) / FILE
        now: dict[str, Any] = self.model_dump(mode="json")
        if path.exists():
            then = json.loads(path.read_text(encoding="utf-8"))
            for name, value in now.items():
                if then.get(name) != value:
                    raise RecipeError(
                        f"{self.out} has a run with {name}={then.get(name)!r}, not {value!r}: give the same "
                        "options to resume it, or another --out"
                    )
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
        return False


def stored_options(folder: Path) -> TuneOptions | None:
    """Return the options of the run in a folder, or None if there is no run."""
    path = folder / FILE
    if not path.is_file():
        return None
    return TuneOptions.model_validate_json(path.read_text(encoding="utf-8"))
