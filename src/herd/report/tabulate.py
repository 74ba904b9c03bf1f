"""Make the tables of the report page as plain data: rows, cells, intervals. The template sets their look.

If a part of the run is missing, a function returns None, or a table whose cells say "not measured" (scores)
or "–" (costs and gates).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import units
from ..package_yaml import package_yaml
from ..units import NOT_MEASURED, duration, fixed, format_value, si, unit_name
from .languages import in_order, language
from .palette import tone
from .run import Estimate, Gate, Run, Stage, finite_number


@dataclass(frozen=True)
class Metric:
    """The title and format of a score. ``better`` is "lower" or "higher"."""

    name: str
    title: str
    better: str
    decimals: int | None = None


METRICS = {row[0]: Metric(*row) for row in package_yaml(__package__, "metrics.yaml")}
"""The scores that the page knows, in the order of their columns."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a small second line (an interval), and its CSS class (num, text, none, good, bad)."""

    text: str
    sub: str = ""
    kind: str = "num"


MISSING = Cell(NOT_MEASURED, kind="none")
TableRow = tuple[str, str | None, list[Cell]]
"""The name of the row, its colour or None, and its cells."""


@dataclass(frozen=True)
class Table:
    """A table: rows under a ``header`` of (title, second line) pairs, and perhaps a row of totals."""

    header: list[tuple[str, str]]
    rows: list[TableRow]
    total: list[Cell] = field(default_factory=list)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first ``left`` columns are aligned left and the others right."""
    rule = [":--" if index < left else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def metric(name: str) -> Metric:
    """Return the title and format of the score ``name``. Of an unknown score, higher values are better."""
    return METRICS.get(name) or Metric(name, name.replace("_", " "), "higher")


def interval(estimate: Estimate, unit: str, decimals: int | None = None) -> str:
    """Return the interval of an estimate, such as ``1.396 – 1.424``, or "" if there is none."""
    if estimate.lo is None or estimate.hi is None:
        return ""
    return f"{format_value(estimate.lo, unit, decimals)} – {format_value(estimate.hi, unit, decimals)}"


def cell(estimate: Estimate | None, unit: str, decimals: int | None = None) -> Cell:
    """Return the cell of an estimate, or one that says "not measured" if there is none."""
    if estimate is None:
        return MISSING
    return Cell(format_value(estimate.value, unit, decimals), interval(estimate, unit, decimals))


def scores_table(run: Run) -> Table | None:
    """Return the scores by model, without paired comparisons. Needle accuracy has a column per length."""
    columns = _columns(run)
    if not columns:
        return None
    header = [
        (title, f"{unit_name(unit)} {'↓' if metric(name).better == 'lower' else '↑'}".strip())
        for name, _, title, unit in columns
    ]
    rows: list[TableRow] = []
    for model in run.models:
        cells = []
        for name, length, _, unit in columns:
            found, score = None, run.score(model, name)
            if score:
                found = score.detail.get("by_length", {}).get(length) if length else score.estimate
            cells.append(cell(found, unit, metric(name).decimals))
        rows.append((model, tone(model), cells))
    return Table([("model", ""), *header], rows)


def _columns(run: Run) -> list[tuple[str, str, str, str]]:
    """Return the name, length ("" for none), title and unit of each column, in the order of `METRICS`."""
    present = dict.fromkeys(score.name for score in run.scores if "_vs_" not in score.name)
    columns = []
    for name in sorted(
        present, key=lambda name: list(METRICS).index(name) if name in METRICS else len(METRICS)
    ):
        scores = [score for score in run.scores if score.name == name]
        lengths = {length for score in scores for length in score.detail.get("by_length", {})}
        for length in sorted(lengths, key=lambda length: int(length) if length.isdigit() else 0) or [""]:
            title = f"{metric(name).title} at {int(length):,}" if length.isdigit() else metric(name).title
            columns.append((name, length, title, scores[0].unit))
    return columns


def differences_table(run: Run) -> Table | None:
    """Return the paired comparisons between models."""
    rows: list[TableRow] = []
    for score in run.scores:
        name, _, rival = score.name.partition("_vs_")
        if not rival:
            continue
        shown = cell(score.estimate, score.unit, metric(name).decimals)
        sign = "+" if score.estimate.value > 0 else ""
        n = "" if score.estimate.n is None else f"{score.estimate.n:,}"
        title, unit = Cell(metric(name).title, kind="text"), Cell(unit_name(score.unit), kind="text")
        cells = [title, Cell(sign + shown.text, shown.sub), unit, Cell(n)]
        rows.append((f"{score.model} − {rival}", tone(score.model), cells))
    header = [("difference", ""), ("of", ""), ("value", "95 % interval"), ("unit", ""), ("items", "")]
    return Table(header, rows) if rows else None


def _breakdowns(run: Run, name: str, breakdown: str) -> dict[str, dict[str, Estimate]]:
    """Return the values of a breakdown of a score, for the models that have it."""
    scores = {model: run.score(model, name) for model in run.models}
    return {
        model: score.detail[breakdown]
        for model, score in scores.items()
        if score and score.detail.get(breakdown)
    }


def language_table(run: Run) -> Table | None:
    """Return the tokenizer's bytes per token and the bits per byte of each model, by language."""
    records: list[dict[str, Any]] = [stage.record.get("bytes_per_token") or {} for stage in run.stages]
    bytes_per_token = next(filter(None, records), {})
    measured = _breakdowns(run, "bpb", "by_lang")
    rows: list[TableRow] = []
    for code in in_order([*bytes_per_token, *(code for parts in measured.values() for code in parts)]):
        value = finite_number(bytes_per_token.get(code))
        cells = [MISSING if value is None else Cell(fixed(value, 2))]
        cells += [cell(parts.get(code), "bits/byte", 3) for parts in measured.values()]
        rows.append((language(code), None, cells))
    models = [(model, "bits/byte ↓") for model in measured]
    return Table([("language", ""), ("tokenizer", "bytes/token ↑"), *models], rows) if rows else None


def tool_tables(run: Run) -> list[tuple[str, Table]]:
    """Return tool use broken down by everything but language, as (title, table) pairs."""
    parts = {"by_form": "call format", "by_task": "task", "by_kind": "kind of dialog"}
    tables = [(title, tool_table(run, part, title)) for part, title in parts.items()]
    return [(title, table) for title, table in tables if table]


def tool_table(run: Run, part: str, title: str = "language") -> Table | None:
    """Return the tool use of each model, broken down by ``part``."""
    measured = _breakdowns(run, "tool_use", part)
    rows: list[TableRow] = []
    for key in in_order(key for parts in measured.values() for key in parts):
        cells = [cell(parts.get(key), "fraction", 1) for parts in measured.values()]
        rows.append((language(key) if part == "by_lang" else key, None, cells))
    return Table([(title, ""), *((model, "% ↑") for model in measured)], rows) if rows else None


def cost_table(run: Run) -> Table | None:
    """Return the cost of each stage, measured and predicted, and a row of totals.

    The total of peak memory is the largest one. The total ratio is of the stages that have both times.
    """
    if not run.stages:
        return None
    rows: list[TableRow] = [
        (stage.name, stage_tone(stage), _cost_cells(stage, _ratio(stage.seconds, stage.predicted_seconds)))
        for stage in run.stages
    ]
    summed = ("seconds", "predicted_seconds", "tokens", "flops")
    costs: dict[str, Any] = {key: total(run.stages, key) for key in summed}
    for key in ("peak_rss_bytes", "predicted_peak_bytes"):
        costs[key] = max(filter(None, (getattr(stage, key) for stage in run.stages)), default=None)
    header = [
        ("stage", ""), ("time", "measured"), ("", "predicted"), ("", "ratio"), ("tokens", ""),
        ("tokens/s", ""), ("compute", ""), ("rate", "FLOP/s"), ("peak memory", "measured"), ("", "predicted"),
    ]  # fmt: skip
    with_both = [stage for stage in run.stages if None not in (stage.seconds, stage.predicted_seconds)]
    ratio = _ratio(total(with_both, "seconds"), total(with_both, "predicted_seconds"))
    return Table(header, rows, _cost_cells(Stage("total", "", **costs), ratio, rates=False))


def _cost_cells(stage: Stage, ratio: float | None, rates: bool = True) -> list[Cell]:
    """Return the cells of a stage's costs, with "–" for a missing cost or a rate without time."""
    tokens_per_second = _ratio(stage.tokens, stage.seconds) if rates else None
    flops_per_second = _ratio(stage.flops, stage.seconds) if rates else None
    costs: list[tuple[float | None, Callable[[float], str]]] = [
        (stage.seconds, duration),
        (stage.predicted_seconds, duration),
        (ratio, lambda value: f"{fixed(value, 2)} ×"),
        (stage.tokens, si),
        (tokens_per_second, lambda value: fixed(value, 0)),
        (stage.flops, lambda value: si(value, "FLOP")),
        (flops_per_second, si),
        (stage.peak_rss_bytes, units.nbytes),
        (stage.predicted_peak_bytes, units.nbytes),
    ]
    return [Cell("–", kind="none") if value is None else Cell(text(value)) for value, text in costs]


def _ratio(value: float | None, divisor: float | None) -> float | None:
    return value / divisor if value is not None and divisor else None


def gates_table(run: Run) -> Table | None:
    """Return the gates of all stages with the value reached and the bar to reach."""
    rows: list[TableRow] = []
    for stage in run.stages:
        for gate in stage.gates:
            verdict = Cell("passed" if gate.passed else "not passed", kind="good" if gate.passed else "bad")
            cells = [Cell(gate.name, kind="text"), *_gate_numbers(gate), verdict]
            rows.append((stage.name, stage_tone(stage), cells))
    header = [("stage", ""), ("gate", ""), ("value", ""), ("bar", ""), ("unit", ""), ("", "")]
    return Table(header, rows) if rows else None


def _gate_numbers(gate: Gate) -> list[Cell]:
    """Return the cells of a gate's value, bar and unit, with "–" for a missing value or bar."""
    unit = gate.unit
    if units.is_share(unit) and isinstance(gate.bar, str):  # next to a bar in words no value is in %
        unit = ""

    def text(value: object) -> str:
        number = finite_number(value)
        if number is None:
            return "–" if value is None else str(value)
        if units.is_share(gate.unit):
            return format_value(number, unit)
        return format_value(number, unit, 3)

    return [Cell(text(gate.value)), Cell(text(gate.bar)), Cell(unit_name(unit), kind="text")]


def stage_tone(stage: Stage) -> str:
    """Return the colour of the model that a stage makes, or "none" if it makes no model."""
    return tone(stage.model_name) if stage.model_name else "none"


def total(stages: Sequence[Stage], key: str) -> float | None:
    """Return the sum of a cost over the stages that recorded it, or None if there are none."""
    values = [value for stage in stages if (value := getattr(stage, key)) is not None]
    return sum(values) if values else None
