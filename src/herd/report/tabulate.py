"""Make the tables of the page as plain data: rows, cells, intervals. The template decides how they look.

Every function works with any part of the run missing: it then returns None, or cells that say "not measured".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import units
from .palette import tone
from .published import read_yaml
from .run import Estimate, Gate, Run, Stage, finite_number
from .units import NBSP, NOT_MEASURED, duration, fixed, format_value, in_order, language, si, unit_name


@dataclass(frozen=True)
class Metric:
    """How a score is titled and printed; ``better`` is "lower" or "higher"."""

    name: str
    title: str
    better: str
    decimals: int | None = None


METRICS = {row[0]: Metric(*row) for row in read_yaml("herd.report", "metrics.yaml")}
"""The scores that the page knows, in the order of their columns."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a small second line (an interval), and its class: num, text, none, good, bad."""

    text: str
    sub: str = ""
    kind: str = "num"


MISSING = Cell(NOT_MEASURED, kind="none")
TableRow = tuple[str, str | None, list[Cell]]
"""Name, colour or None, cells."""


@dataclass(frozen=True)
class Table:
    """Rows under a ``header`` of (title, second line) pairs, and a row of totals."""

    header: list[tuple[str, str]]
    rows: list[TableRow]
    total: list[Cell] = field(default_factory=list)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first ``left`` columns are aligned left and the others right."""
    rule = [":--" if index < left else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def metric(name: str) -> Metric:
    """Return how to show the score called ``name``."""
    return METRICS.get(name) or Metric(name, name.replace("_", " "), "higher")


def interval(found: Estimate, unit: str, decimals: int | None = None) -> str:
    """Return ``1.396 – 1.424``, or "" if there is no interval."""
    if found.lo is None or found.hi is None:
        return ""
    return f"{format_value(found.lo, unit, decimals)} – {format_value(found.hi, unit, decimals)}"


def cell(found: Estimate | None, unit: str, decimals: int | None = None) -> Cell:
    """Return the cell of an estimate; None says "not measured"."""
    if found is None:
        return MISSING
    return Cell(format_value(found.value, unit, decimals), interval(found, unit, decimals))


def scores_table(run: Run) -> Table | None:
    """Return all scores by model; needle accuracy has a column per length."""
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
        for name, part, _, unit in columns:
            found, score = None, run.score(model, name)
            if score:
                found = score.detail.get("by_length", {}).get(part) if part else score.estimate
            cells.append(cell(found, unit, metric(name).decimals))
        rows.append((model, tone(model), cells))
    return Table([("model", ""), *header], rows)


def _columns(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (name of the score, part, title, unit); scores that the page knows come first, in its order."""
    present = dict.fromkeys(score.name for score in run.scores if "_vs_" not in score.name)
    columns = []
    for name in sorted(
        present, key=lambda name: list(METRICS).index(name) if name in METRICS else len(METRICS)
    ):
        scores = [score for score in run.scores if score.name == name]
        lengths = {part for score in scores for part in score.detail.get("by_length", {})}
        for part in sorted(lengths, key=lambda part: int(part) if part.isdigit() else 0) or [""]:
            title = f"{metric(name).title} at {int(part):,}" if part.isdigit() else metric(name).title
            columns.append((name, part, title, scores[0].unit))
    return columns


def differences_table(run: Run) -> Table | None:
    """Return the paired comparisons between models."""
    rows: list[TableRow] = []
    for score in run.scores:
        kind, _, rival = score.name.partition("_vs_")
        if not rival:
            continue
        shown = cell(score.estimate, score.unit, metric(kind).decimals)
        sign = "+" if score.estimate.value > 0 else ""
        n = "" if score.estimate.n is None else f"{score.estimate.n:,}"
        title, unit = Cell(metric(kind).title, kind="text"), Cell(unit_name(score.unit), kind="text")
        cells = [title, Cell(sign + shown.text, shown.sub), unit, Cell(n)]
        rows.append((f"{score.model} − {rival}", tone(score.model), cells))
    header = [("difference", ""), ("of", ""), ("value", "95 % interval"), ("unit", ""), ("items", "")]
    return Table(header, rows) if rows else None


def _breakdowns(run: Run, name: str, part: str) -> dict[str, dict[str, Estimate]]:
    """Return the parts of a score by model, for the models whose score is broken down."""
    scores = {model: run.score(model, name) for model in run.models}
    return {model: score.detail[part] for model, score in scores.items() if score and score.detail.get(part)}


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
    """Return what each stage cost, measured next to predicted, and the totals."""
    if not run.stages:
        return None
    rows: list[TableRow] = [(stage.name, stage_tone(stage), _cost_cells(stage)) for stage in run.stages]
    summed = ("seconds", "predicted_seconds", "tokens", "flops")
    costs: dict[str, Any] = {key: total(run.stages, key) for key in summed}
    costs |= {key: _largest(run.stages, key) for key in ("peak_rss_bytes", "predicted_peak_bytes")}
    header = [
        ("stage", ""), ("time", "measured"), ("", "predicted"), ("", "ratio"), ("tokens", ""),
        ("tokens/s", ""), ("compute", ""), ("rate", "FLOP/s"), ("peak memory", "measured"), ("", "predicted"),
    ]  # fmt: skip
    return Table(header, rows, _cost_cells(Stage("total", "", **costs), rates=False))


def _cost_cells(stage: Stage, rates: bool = True) -> list[Cell]:
    seconds, expected, tokens, flops = stage.seconds, stage.predicted_seconds, stage.tokens, stage.flops
    shown = [
        seconds and duration(seconds),
        expected and duration(expected),
        seconds and expected and f"{fixed(seconds / expected, 2)}{NBSP}×",
        tokens and si(tokens),
        rates and tokens and seconds and fixed(tokens / seconds, 0),
        flops and si(flops, "FLOP"),
        rates and flops and seconds and si(flops / seconds),
        stage.peak_rss_bytes and units.nbytes(stage.peak_rss_bytes),
        stage.predicted_peak_bytes and units.nbytes(stage.predicted_peak_bytes),
    ]
    return [Cell(text) if isinstance(text, str) else Cell("–", kind="none") for text in shown]


def gates_table(run: Run) -> Table | None:
    """Return the gates of all stages: what was reached, and what had to be."""
    rows: list[TableRow] = []
    for stage in run.stages:
        for gate in stage.gates:
            verdict = Cell("passed" if gate.passed else "not passed", kind="good" if gate.passed else "bad")
            cells = [Cell(gate.name, kind="text"), *_gate_numbers(gate), verdict]
            rows.append((stage.name, stage_tone(stage), cells))
    header = [("stage", ""), ("gate", ""), ("value", ""), ("bar", ""), ("unit", ""), ("", "")]
    return Table(header, rows) if rows else None


def _gate_numbers(gate: Gate) -> list[Cell]:
    def shown(value: object) -> str:
        found = finite_number(value)
        if found is None:
            return "–" if value is None else str(value)
        return format_value(found, gate.unit, None if units.is_share(gate.unit) else 3)

    if units.is_share(gate.unit) and finite_number(gate.bar) is None:  # a bar in words keeps its own scale
        return [
            Cell(units.short(finite_number(gate.value) or 0)),
            Cell(shown(gate.bar)),
            Cell("", kind="text"),
        ]
    return [Cell(shown(gate.value)), Cell(shown(gate.bar)), Cell(unit_name(gate.unit), kind="text")]


def stage_tone(stage: Stage) -> str:
    """Return the colour of the model that a stage makes; "none" if it makes none."""
    return tone(stage.model_name) if stage.model_name else "none"


def total(stages: Sequence[Stage], key: str) -> float | None:
    """Return the sum of a cost over the stages that recorded it; None if none did."""
    values = [value for stage in stages if (value := getattr(stage, key)) is not None]
    return sum(values) if values else None


def _largest(stages: Sequence[Stage], key: str) -> float | None:
    return max((value for stage in stages if (value := getattr(stage, key)) is not None), default=None)
