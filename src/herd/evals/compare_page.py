"""Write a comparison as a self-contained HTML page, as JSON, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from ..files import write_atomically
from ..report import charts
from ..report.languages import in_order, language
from ..report.palette import tone
from ..report.published import Published
from ..report.tabulate import Cell, markdown
from ..report.template import template
from ..units import fixed
from .bootstrap import Interval
from .compare import LESS_IS_BETTER, NOT_ASKED, ComparedMetric, Comparison, Difference
from .score import Score

TONES = ("teacher", "instruct", "student", "long", "control", "other", "good", "bad")
SHORT = {"words": 0, "bits/byte": 3, "nats/token": 4, "bytes": 2}
"""Decimals by unit, for values that are not fractions."""
COLUMNS = ("task", "settings", "model", "metric", "unit", "group", "value", "lo", "hi", "n")


def write_comparison(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write compare.html, .json, .csv and .md into ``folder`` and return their paths by kind."""
    texts = {
        "html": comparison_page(comparison),
        "json": json.dumps(comparison.record(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "csv": as_csv(comparison),
        "md": as_markdown(comparison),
    }
    paths = {kind: folder / f"compare.{kind}" for kind in texts}
    for kind, text in texts.items():
        write_atomically(paths[kind], text)
    return paths


def comparison_page(comparison: Comparison) -> str:
    """Return the HTML page."""
    reference, *others = comparison.models
    tones, rows = colours(comparison.models), comparison.rows
    return template("herd.evals", "compare.html.jinja").render(
        c=comparison,
        tones=tones,
        reference=reference,
        others=others,
        standing=[d for d in comparison.differences if d.stands],
        scores=score_rows(rows, comparison.models),
        further=score_rows(comparison.further, comparison.models),
        published=published_tables(rows),
        paired=[(row, [difference_cell(d) for d in found]) for row, found in _from_reference(comparison)],
        pairs=[(d, difference_cell(d)) for d in comparison.differences],
        groups=[(row, group_rows(comparison, row)) for row in (*rows, *comparison.further) if row.groups],
        maps=heat_maps(comparison),
        charts=[Markup(drawn) for row in rows if (drawn := score_chart(row, tones))],
        flips={row.title: [f for f in comparison.flips if f.task == row.title] for row in rows},
        missing=not_run(comparison),
        unit=unit_title,
        fixed=fixed,
    )


def colours(models: Sequence[str]) -> dict[str, str]:
    """Return a colour per model: the colour of its role if that is free, else the next free one."""
    out: dict[str, str] = {}
    for model in models:
        wanted, free = tone(model), [colour for colour in TONES if colour not in out.values()]
        out[model] = wanted if wanted in free and wanted != "other" else (free or ["other"])[0]
    return out


def format_score(value: float, unit: str) -> str:
    """Format fractions in percent with one decimal, other values with the decimals of their unit."""
    return fixed(100 * value, 1) if unit == "fraction" else fixed(value, SHORT.get(unit, 3))


def unit_title(unit: str) -> str:
    """Return the unit for the table, with an arrow if less is better."""
    return "%" if unit == "fraction" else f"{unit}{' ↓' if unit in LESS_IS_BETTER else ''}"


def score_cell(score: Score | None, reason: str = "") -> Cell:
    """Return the cell of a score with its interval.

    Without a score, it says whether the task was requested.
    """
    if score is None:
        return Cell("–" if reason in ("", NOT_ASKED) else "not run", kind="none")
    ends = [] if score.lo is None or score.hi is None else [score.lo, score.hi]
    return Cell(
        format_score(score.value, score.unit), " – ".join(format_score(end, score.unit) for end in ends)
    )


def score_rows(
    rows: Sequence[ComparedMetric], models: Sequence[str]
) -> list[tuple[ComparedMetric, list[Cell]]]:
    """Return every row with a cell per model."""
    return [
        (row, [score_cell(row.scores[model], row.reasons.get(model, "")) for model in models]) for row in rows
    ]


def not_run(comparison: Comparison) -> list[tuple[ComparedMetric, list[str], str]]:
    """Return (row, models, reason) for all tasks that were requested and did not run."""
    found: dict[tuple[str, str], tuple[ComparedMetric, list[str], str]] = {}
    for row in comparison.rows:
        for model, why in row.reasons.items():
            if why != NOT_ASKED:
                found.setdefault((row.title, why), (row, [], why))[1].append(model)
    return list(found.values())


def difference_cell(gap: Difference | None) -> Cell:
    """Return the cell of a difference: value, interval, items won and lost, colour if significant."""
    if gap is None:
        return Cell("–", kind="none")
    kind = {"": "num", gap.first: "good"}.get(gap.better, "bad")
    flips = f"+{gap.gained} −{gap.lost} of {gap.n}" if gap.unit == "fraction" else f"{gap.n} texts"
    return Cell(signed(gap.interval.value, gap.unit), f"{bounds(gap.interval, gap.unit)}; {flips}", kind)


def signed(value: float, unit: str) -> str:
    """Format a difference, with a plus sign if it is positive."""
    text = format_score(value, unit)
    return text if value <= 0 or text.strip("0.") == "" else f"+{text}"


def bounds(interval: Interval, unit: str) -> str:
    """Format the interval of a difference. A single item has none."""
    if math.isnan(interval.lo):
        return "one item"
    return f"{signed(interval.lo, unit)} … {signed(interval.hi, unit)}"


def group_rows(comparison: Comparison, row: ComparedMetric) -> list[tuple[str, list[Cell]]]:
    """Return a row per group. Languages are in their usual order.

    Rows of the main metric also have the paired differences.
    """
    headline = row in comparison.rows
    found = {m: d.by_group for m in comparison.models if headline and (d := _find(comparison, row, m))}
    lines = []
    for group in in_order(row.groups):
        cells = []
        for model, score in row.scores.items():
            cell = score_cell(_part(score, group) if score else None)
            if difference := found.get(model, {}).get(group):
                delta = f"Δ {signed(difference.value, row.unit)} ({bounds(difference, row.unit)})"
                cell = replace(cell, sub=f"{cell.sub}; {delta}")
            cells.append(cell)
        lines.append((language(group), cells))
    return lines


def _part(score: Score, group: str) -> Score | None:
    found = score.detail.get("by_group", {}).get(group)
    return Score(group, found["value"], score.unit, found["lo"], found["hi"], found["n"]) if found else None


def published_tables(
    rows: Sequence[ComparedMetric],
) -> list[tuple[str, str, list[str], list[tuple[str, str, list[str]]]]]:
    """Return (title, source and date, models, rows of (task, setting, scores)) per source and model kind."""
    tables: dict[tuple[str, str], list[tuple[str, Published]]] = {}
    for row in rows:
        for score in row.published:
            tables.setdefault((score.source.name, score.kind), []).append((row.task, score))
    out = []
    for (_, kind), found in tables.items():
        source = found[0][1].source
        models = list(dict.fromkeys(score.model for _, score in found))
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for task, score in found:
            line = lines.setdefault((task, score.setting.removesuffix(" (another setting)")), {})
            line[score.model] = f"{score.score:g}{'*' if score.starred else ''}"
        listed = [(task, how, [line.get(m, "–") for m in models]) for (task, how), line in lines.items()]
        out.append((f"{source.title} ({kind} models)", f"{source.where}, {source.date}", models, listed))
    return out


def heat_maps(comparison: Comparison) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Draw a heat map of length and depth per model, for every task that has such results."""
    out = []
    for row in comparison.rows:
        maps = []
        for model, score in row.scores.items():
            if score and (cells := score.detail.get("grid")):
                grid = [(cell["length"], cell["depth"], cell["value"]) for cell in cells]
                drawn = charts.length_depth_map(grid, label=f"{row.title}, {model}")
                maps.append((model, Markup(drawn)))
        if maps:
            out.append((row.title, maps))
    return out


def score_chart(row: ComparedMetric, tones: Mapping[str, str]) -> str:
    """Draw the scores of two or more models with their intervals."""
    lines = []
    for model, score in row.scores.items():
        if score is not None:
            scale = 100.0 if score.unit == "fraction" else 1.0
            lo, hi = (None if end is None else end * scale for end in (score.lo, score.hi))
            shown = format_score(score.value, score.unit)
            lines.append(charts.ChartRow(model, score.value * scale, lo, hi, tones[model], shown))
    if len(lines) < 2:
        return ""
    title = f"{row.title}: {row.metric}, {unit_title(row.unit)}"
    decimals = 1 if row.unit == "fraction" else 3
    return charts.interval_chart(lines, label=row.title, title=title, decimals=decimals)


def _find(comparison: Comparison, row: ComparedMetric, model: str) -> Difference | None:
    """Return the difference of ``model`` from the first model."""
    wanted = (row.title, model, comparison.models[0])
    return next((d for d in comparison.differences if (d.task, d.first, d.second) == wanted), None)


def _from_reference(comparison: Comparison) -> list[tuple[ComparedMetric, list[Difference | None]]]:
    """Return the rows that have differences from the first model, with these differences."""
    found = [(row, [_find(comparison, row, m) for m in comparison.models[1:]]) for row in comparison.rows]
    return [(row, differences) for row, differences in found if any(differences)]


def as_markdown(comparison: Comparison) -> str:
    """Return scores, differences from the first model, published scores and verdicts as Markdown."""
    models, reference = comparison.models, comparison.models[0]
    parts = [f"# {', '.join(models)}", "Scores with their 95 % intervals."]
    for some in filter(None, (comparison.rows, comparison.further)):
        rows = []
        for row, cells in score_rows(some, models):
            texts = [f"{c.text} [{c.sub}]" if c.sub else c.text for c in cells]
            rows.append([row.title, row.metric.replace("_", " "), unit_title(row.unit), *texts])
        parts.append(markdown(["task", "metric", "unit", *models], rows, left=3))
    if len(models) > 1:
        n = len(comparison.differences)
        parts.append(
            f"Paired differences from {reference}. **Bold**: significant by Holm's procedure over all {n}."
        )
        rows = [
            [row.title, unit_title(row.unit), *map(_markdown_difference, found)]
            for row, found in _from_reference(comparison)
        ]
        parts.append(markdown(["task", "unit", *models[1:]], rows, left=2))
    for title, where, columns, lines in published_tables(comparison.rows):
        parts.append(f"**Published under other settings, not measured here:** {title}. {where}. Percent.")
        rows = [[task, setting, *cells] for task, setting, cells in lines]
        parts.append(markdown(["task", "setting", *columns], rows, left=2))
    for v in comparison.verdicts:
        counts = f"{len(v.wins)} ahead, {len(v.losses)} behind, {len(v.ties)} within the noise"
        parts.append(f"- “{v.claim.said}”: **{v.verdict}** ({counts}){'; ' + v.own if v.own else ''}")
    if missing := [f"- {row.title}, {', '.join(some)}: {why}" for row, some, why in not_run(comparison)]:
        parts += ["Not run:", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def _markdown_difference(gap: Difference | None) -> str:
    if gap is None:
        return "–"
    cell = difference_cell(gap)
    text = f"**{cell.text}**" if gap.stands else cell.text
    return f"{text} [{bounds(gap.interval, gap.unit)}]"


def as_csv(comparison: Comparison) -> str:
    """Return a line per score and per part of its breakdown. A cell without a number is empty."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(COLUMNS)
    for row in (*comparison.rows, *comparison.further):
        settings = ";".join(f"{key}={value}" for key, value in row.settings.items())
        for model, score in row.scores.items():
            if score is None:
                continue
            first = [row.task, settings, model, score.name, score.unit]
            write.writerow([*first, "", score.value, score.lo, score.hi, score.n])
            for group, part in score.detail.get("by_group", {}).items():
                write.writerow([*first, group, part["value"], part["lo"], part["hi"], part["n"]])
    return out.getvalue()
