"""The tables of the page as plain data: rows, cells, intervals. The template decides how they look.

Every function works with any part of the run missing, and then gives None or cells that say "not measured".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .palette import tone
from .run import Estimate, Gate, Run, Stage, finite_number
from .units import (
    NBSP,
    NOT_MEASURED,
    duration,
    fixed,
    format_value,
    in_order,
    is_share,
    language,
    nbytes,
    short,
    si,
    unit_name,
)


@dataclass(frozen=True)
class Metric:
    """How a score is titled and printed; ``better`` is "lower" or "higher"."""

    name: str
    title: str
    better: str
    decimals: int | None = None


METRICS = (
    Metric("bpb", "bits per byte", "lower", 3),
    Metric("kl", "KL from teacher", "lower", 3),
    Metric("kl_p99", "KL, 99th percentile", "lower", 2),
    Metric("top1", "top-1 agreement", "higher", 1),
    Metric("needle", "needle", "higher", 1),
    Metric("tool_use", "tool use", "higher", 1),
    Metric("overlap", "overlap of predictions", "higher", 1),
    Metric("code_parse", "code parses", "higher", 1),
    Metric("code_pass", "code passes", "higher", 1),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a second small line (an interval), and a class: num, text, none, good, bad."""

    text: str
    sub: str = ""
    kind: str = "num"


MISSING = Cell(NOT_MEASURED, kind="none")


@dataclass(frozen=True)
class Table:
    """``header`` are (title, second line) pairs; a row is (name, colour or None, cells)."""

    header: list[tuple[str, str]]
    rows: list[tuple[str, str | None, list[Cell]]]
    total: list[Cell] = field(default_factory=list)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are set left and the others right."""
    rule = [":--" if index < left else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def metric(name: str) -> Metric:
    return _BY_NAME.get(name) or Metric(name, name.replace("_", " "), "higher")


def interval(found: Estimate, unit: str, decimals: int | None = None) -> str:
    """``1.396 – 1.424``; "" if there is none."""
    if found.lo is None or found.hi is None:
        return ""
    return f"{format_value(found.lo, unit, decimals)} – {format_value(found.hi, unit, decimals)}"


def cell(found: Estimate | None, unit: str, decimals: int | None = None) -> Cell:
    return (
        MISSING
        if found is None
        else Cell(format_value(found.value, unit, decimals), interval(found, unit, decimals))
    )


def scores_table(run: Run) -> Table | None:
    """Model × everything measured; needle accuracy has a column a length."""
    columns = _columns(run)
    if not columns:
        return None
    header = [
        (title, f"{unit_name(unit)} {'↓' if metric(name).better == 'lower' else '↑'}".strip())
        for name, _, title, unit in columns
    ]
    rows: list[tuple[str, str | None, list[Cell]]] = []
    for model in run.models:
        cells = []
        for name, part, _, unit in columns:
            score = run.score(model, name)
            found = (
                (score.detail.get("by_length", {}).get(part) if part else score.estimate) if score else None
            )
            cells.append(cell(found, unit, metric(name).decimals))
        rows.append((model, tone(model), cells))
    return Table([("model", ""), *header], rows)


def _columns(run: Run) -> list[tuple[str, str, str, str]]:
    """(score's name, part, title, unit), known scores first, in the table's order."""
    present = dict.fromkeys(score.name for score in run.scores if "_vs_" not in score.name)
    names = [m.name for m in METRICS if m.name in present] + [
        name for name in present if name not in _BY_NAME
    ]
    columns = []
    for name in names:
        unit = next(score.unit for score in run.scores if score.name == name)
        lengths = {
            part for score in run.scores if score.name == name for part in score.detail.get("by_length", {})
        }
        parts = sorted(lengths, key=lambda part: int(part) if part.isdigit() else 0)
        for part in parts or [""]:
            title = f"{metric(name).title} at {int(part):,}" if part.isdigit() else metric(name).title
            columns.append((name, part, title, unit))
    return columns


def differences_table(run: Run) -> Table | None:
    """Paired comparisons between models."""
    rows: list[tuple[str, str | None, list[Cell]]] = []
    for score in run.scores:
        kind, _, rival = score.name.partition("_vs_")
        if not rival:
            continue
        decimals = metric(kind).decimals
        shown = cell(score.estimate, score.unit, decimals)
        sign = "+" if score.estimate.value > 0 else ""
        n = "" if score.estimate.n is None else f"{score.estimate.n:,}"
        cells = [
            Cell(metric(kind).title, kind="text"),
            Cell(sign + shown.text, shown.sub),
            Cell(unit_name(score.unit), kind="text"),
            Cell(n),
        ]
        rows.append((f"{score.model} − {rival}", tone(score.model), cells))
    header = [("difference", ""), ("of", ""), ("value", "95 % interval"), ("unit", ""), ("items", "")]
    return Table(header, rows) if rows else None


def language_table(run: Run) -> Table | None:
    """Bytes per token of the tokenizer, then bits per byte of each model, by language."""
    tokenizer = next((stage.record for stage in run.stages if stage.record.get("bytes_per_token")), {})
    bytes_per_token = tokenizer.get("bytes_per_token") or {}
    measured = {model: score.detail["by_lang"] for model in run.models
                if (score := run.score(model, "bpb")) and score.detail.get("by_lang")}  # fmt: skip
    order = in_order([*bytes_per_token, *(code for parts in measured.values() for code in parts)])
    if not order:
        return None
    rows: list[tuple[str, str | None, list[Cell]]] = []
    for code in order:
        value = finite_number(bytes_per_token.get(code))
        cells = [MISSING if value is None else Cell(fixed(value, 2))]
        cells += [cell(parts.get(code), "bits/byte", 3) for parts in measured.values()]
        rows.append((language(code), None, cells))
    header = [
        ("language", ""),
        ("tokenizer", "bytes/token ↑"),
        *((model, "bits/byte ↓") for model in measured),
    ]
    return Table(header, rows)


PARTS = {"by_form": "call form", "by_task": "task", "by_kind": "kind of dialog"}


def tool_tables(run: Run) -> list[tuple[str, Table]]:
    """Tool use by everything but language, as far as it was broken down."""
    tables = [(title, tool_table(run, part, title)) for part, title in PARTS.items()]
    return [(title, table) for title, table in tables if table]


def tool_table(run: Run, part: str, title: str = "language") -> Table | None:
    """Tool use of each model, broken down by ``part``."""
    measured = {model: score for model in run.models
                if (score := run.score(model, "tool_use")) and score.detail.get(part)}  # fmt: skip
    order = in_order(key for score in measured.values() for key in score.detail[part])
    if not order:
        return None
    rows: list[tuple[str, str | None, list[Cell]]] = [
        (language(key) if part == "by_lang" else key, None,
         [cell(score.detail[part].get(key), score.unit, 1) for score in measured.values()])
        for key in order
    ]  # fmt: skip
    header = [(title, ""), *((m, "% ↑") for m in measured)]
    return Table(header, rows)


def cost_table(run: Run) -> Table | None:
    """What each stage cost, measured beside predicted."""
    if not run.stages:
        return None
    rows: list[tuple[str, str | None, list[Cell]]] = []
    for stage in run.stages:
        colour = tone(stage.model_name) if stage.model_name else "none"
        rows.append((stage.name, colour, _cost_cells(stage)))
    whole = Stage(
        "total", "", total(run.stages, "seconds"), total(run.stages, "predicted_seconds"), total(run.stages, "tokens"),
        total(run.stages, "flops"), largest(run.stages, "peak_bytes"), largest(run.stages, "predicted_peak_bytes"),
    )  # fmt: skip
    header = [
        ("stage", ""), ("time", "measured"), ("", "predicted"), ("", "ratio"), ("tokens", ""), ("tokens/s", ""),
        ("compute", ""), ("rate", "FLOP/s"), ("peak memory", "measured"), ("", "predicted"),
    ]  # fmt: skip
    return Table(header, rows, _cost_cells(whole, pace=False))


def _cost_cells(stage: Stage, pace: bool = True) -> list[Cell]:
    def shown(value: float | None, text: str) -> Cell:
        return Cell("–", kind="none") if not value else Cell(text)

    seconds, expected, tokens, flops = stage.seconds, stage.predicted_seconds, stage.tokens, stage.flops
    ratio = seconds / expected if seconds and expected else None
    speed = tokens / seconds if pace and tokens and seconds else None
    rate = flops / seconds if pace and flops and seconds else None
    return [
        shown(seconds, duration(seconds or 0)),
        shown(expected, duration(expected or 0)),
        shown(ratio, f"{fixed(ratio or 0, 2)}{NBSP}×"),
        shown(tokens, si(tokens or 0)),
        shown(speed, fixed(speed or 0, 0)),
        shown(flops, si(flops or 0, "FLOP")),
        shown(rate, si(rate or 0)),
        shown(stage.peak_bytes, nbytes(stage.peak_bytes or 0)),
        shown(stage.predicted_peak_bytes, nbytes(stage.predicted_peak_bytes or 0)),
    ]


def gates_table(run: Run) -> Table | None:
    rows: list[tuple[str, str | None, list[Cell]]] = []
    for stage in run.stages:
        for gate in stage.gates:
            verdict = Cell("passed" if gate.passed else "not passed", kind="good" if gate.passed else "bad")
            colour = tone(stage.model_name) if stage.model_name else "none"
            rows.append((stage.name, colour, [Cell(gate.name, kind="text"), *_gate_numbers(gate), verdict]))
    header = [("stage", ""), ("gate", ""), ("value", ""), ("bar", ""), ("unit", ""), ("", "")]
    return Table(header, rows) if rows else None


def _gate_numbers(gate: Gate) -> list[Cell]:
    def shown(value: object) -> str:
        found = finite_number(value)
        if found is None:
            return "–" if value is None else str(value)
        return format_value(found, gate.unit, None if is_share(gate.unit) else 3)

    unit = unit_name(gate.unit)
    if is_share(gate.unit) and finite_number(gate.bar) is None:  # a bar in words keeps its own scale
        return [Cell(short(finite_number(gate.value) or 0)), Cell(shown(gate.bar)), Cell("", kind="text")]
    return [Cell(shown(gate.value)), Cell(shown(gate.bar)), Cell(unit, kind="text")]


def total(stages: Sequence[Stage], key: str) -> float | None:
    values = [value for stage in stages if (value := getattr(stage, key)) is not None]
    return sum(values) if values else None


def largest(stages: Sequence[Stage], key: str) -> float | None:
    return max((value for stage in stages if (value := getattr(stage, key)) is not None), default=None)
