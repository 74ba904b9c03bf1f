"""The ledger of a shrink run: what every step from teacher to student cost and kept, and whether it helped.

A ledger has *steps* in the order in which they were made, and *controls*: students of the winner's size made
without importance or with layers dropped at equal distances, after equal tokens, and one trained on text
alone from random weights, with the FLOPs of the student's training and of its teacher's labelling together. A
trained step that has more bits per byte than its own start, or a student that has more than a control, is
flagged if the 95 % interval of the paired difference excludes zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import units
from ..files import write_atomically, write_json
from ..report import charts
from ..report.receipt import describe_machine, git_commit
from ..report.template import template
from .measure import Estimate, Quality, difference

MEASURES = {
    "bits_per_byte": ("bits per byte", 4),
    "kl": ("KL, nats per token", 4),
    "accuracy": ("next-token accuracy", 3),
    "accuracy_kept": ("of the teacher's", 3),
    "same_choice": ("same first choice", 3),
}


@dataclass
class LedgerStep:
    """A model of the run: its cost, its quality, and the model that it is compared with.

    ``tokens``, ``flops`` and ``seconds`` are those of its own training. ``teacher_flops`` are those of
    labelling the tokens, which several students may share. ``better_than`` are the models, by name, whose
    bits per byte it must not exceed. ``scores`` are those of copying, looking up and tasks.
    """

    name: str
    what: str
    n_params: int
    nbytes: int
    quality: Quality
    tokens: int = 0
    flops: float = 0.0
    teacher_flops: float = 0.0
    seconds: float = 0.0
    control: bool = False
    better_than: dict[str, Quality] = field(default_factory=dict)
    scores: dict[str, Estimate] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the step as JSON values, with its differences from the models it should beat."""
        compared = {name: difference(self.quality, other) for name, other in self.better_than.items()}
        worse = [name for name, found in compared.items() if (found["lo"] or 0.0) > 0]
        own = {key: value for key, value in vars(self).items() if key not in ("quality", "better_than")}
        return own | self.quality.summary() | {"minus": compared, "worse_than": worse}


def write_ledger(folder: Path, title: str, steps: list[LedgerStep], facts: dict[str, Any]) -> dict[str, Any]:
    """Write ``ledger.json`` and ``ledger.html`` to ``folder`` and return the ledger."""
    records = [step.record() for step in steps]
    ledger: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "steps": records,
        "worse": [
            f"{record['name']} is worse than {other}" for record in records for other in record["worse_than"]
        ],
        "machine": describe_machine(),
        "commit": git_commit(Path(__file__).parent),
    }
    write_json(folder / "ledger.json", ledger)
    page = template("herd.distill", "ledger.html.jinja").render(
        ledger=ledger,
        units=units,
        measures=MEASURES,
        shown=shown,
        scored=[record for record in records if record["scores"]],
        charts=[Markup(_chart(records, name)) for name in ("bits_per_byte", "kl")],
    )
    write_atomically(folder / "ledger.html", page)
    return ledger


def shown(estimate: Estimate, decimals: int) -> str:
    """Return a value with its interval."""
    value, lo, hi = (estimate[key] for key in ("value", "lo", "hi"))
    number = units.fixed(value or 0.0, decimals)
    if lo is None or hi is None:
        return number
    return f"{number} [{units.fixed(lo, decimals)}, {units.fixed(hi, decimals)}]"


def _chart(records: list[dict[str, Any]], measure: str) -> str:
    title, decimals = MEASURES[measure]
    rows = []
    for record in records:
        found = record[measure]
        tone = "control" if record["control"] else "teacher" if record["name"] == "teacher" else "student"
        rows.append(charts.ChartRow(
            record["name"], found["value"], found["lo"], found["hi"], tone,
            units.fixed(found["value"], decimals)))  # fmt: skip
    return charts.interval_chart(rows, label=title, title=title, decimals=decimals)
