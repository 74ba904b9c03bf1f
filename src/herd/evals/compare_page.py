"""A comparison as one HTML page that needs nothing else, as Markdown, and as CSV for whoever computes on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..files import write_atomically
from ..report import charts
from ..report.palette import tone
from ..report.tabulate import Cell, markdown
from ..report.template import template
from ..report.units import fixed, in_order, language
from .bootstrap import Interval
from .compare import LESS_IS_BETTER, NOT_ASKED, ComparedItem, Comparison, Difference
from .score import Score

TONES = ("teacher", "instruct", "student", "long", "control", "other", "good", "bad")
SHORT = {"words": 0, "bits/byte": 3, "nats/token": 4, "bytes": 2}
"""Decimals of units that are no shares."""
COLUMNS = ("task", "settings", "model", "metric", "unit", "group", "value", "lo", "hi", "n")


def write_comparison(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """compare.html, .json, .csv and .md in ``folder``; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
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
    """The HTML page."""
    tones = colours(comparison.models)
    standing = [d for d in comparison.differences if d.stands]
    return template("herd.evals", "compare.html.jinja").render(
        c=comparison,
        tones=tones,
        reference=comparison.models[0],
        others=comparison.models[1:],
        standing=standing,
        scores=score_rows(comparison.rows, comparison.models),
        further=score_rows(comparison.further, comparison.models),
        published=published_tables(comparison.rows),
        paired=[(row, [difference_cell(_find(comparison, row, m)) for m in comparison.models[1:]])
                for row in comparison.rows if any(_find(comparison, row, m) for m in comparison.models[1:])],
        pairs=[(d, difference_cell(d)) for d in comparison.differences],
        groups=[(row, group_rows(comparison, row))
                for row in (*comparison.rows, *comparison.further) if row.groups],
        maps=heat_maps(comparison),
        charts=[Markup(drawn) for row in comparison.rows if (drawn := score_chart(row, tones))],
        flips={row.title: [f for f in comparison.flips if f.task == row.title] for row in comparison.rows},
        missing=not_run(comparison),
        unit=unit_title,
        fixed=fixed,
    )  # fmt: skip


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour for each model: its kind's own while that is free, then the next free one."""
    out: dict[str, str] = {}
    for model in models:
        wanted = tone(model)
        free = [colour for colour in TONES if colour not in out.values()]
        out[model] = wanted if wanted in free and wanted != "other" else (free or ["other"])[0]
    return out


def number(value: float, unit: str) -> str:
    """Shares in percent with one decimal, words with thousands apart, others as their unit wants."""
    return fixed(100 * value, 1) if unit == "fraction" else fixed(value, SHORT.get(unit, 3))


def unit_title(unit: str) -> str:
    """The unit as a row shows it, with the better direction where it is downwards."""
    return "%" if unit == "fraction" else f"{unit}{' ↓' if unit in LESS_IS_BETTER else ''}"


def score_cell(score: Score | None, reason: str = "") -> Cell:
    if score is None:
        return Cell("–" if reason in ("", NOT_ASKED) else "not run", kind="none")
    bounds = "" if score.lo is None or score.hi is None else f"{number(score.lo, score.unit)} – " \
        f"{number(score.hi, score.unit)}"  # fmt: skip
    return Cell(number(score.value, score.unit), bounds)


def score_rows(rows: Sequence[ComparedItem], models: Sequence[str]) -> list[tuple[ComparedItem, list[Cell]]]:
    """Every row with a cell a model."""
    return [
        (row, [score_cell(row.scores[model], row.reasons.get(model, "")) for model in models]) for row in rows
    ]


def not_run(comparison: Comparison) -> list[tuple[ComparedItem, list[str], str]]:
    """(row, models, why) of what was asked for and did not run."""
    found: dict[tuple[str, str], tuple[ComparedItem, list[str], str]] = {}
    for row in comparison.rows:
        for model, why in row.reasons.items():
            if why != NOT_ASKED:
                found.setdefault((row.title, why), (row, [], why))[1].append(model)
    return list(found.values())


def difference_cell(found: Difference | None) -> Cell:
    if found is None:
        return Cell("–", kind="none")
    kind = "num"
    if found.better:
        kind = "good" if found.better == found.first else "bad"
    flips = f"+{found.gained} −{found.lost} of {found.n}" if found.unit == "fraction" else f"{found.n} texts"
    return Cell(
        signed(found.interval.value, found.unit), f"{bounds(found.interval, found.unit)}; {flips}", kind
    )


def signed(value: float, unit: str) -> str:
    text = number(value, unit)
    return text if value <= 0 or text.strip("0.") == "" else f"+{text}"


def bounds(interval: Interval, unit: str) -> str:
    return (
        "one item"
        if interval.lo != interval.lo
        else f"{signed(interval.lo, unit)} … {signed(interval.hi, unit)}"
    )


def group_rows(comparison: Comparison, row: ComparedItem) -> list[tuple[str, list[Cell]]]:
    """Languages in their usual order, everything else as it came; a row a group, of the headline metric with the paired
    difference from the first model."""
    headline = row in comparison.rows
    found = {m: d.by_group for m in comparison.models if headline and (d := _find(comparison, row, m))}
    lines = []
    for group in in_order(row.groups):
        cells = []
        for model, score in row.scores.items():
            cell = score_cell(_part(score, group) if score else None)
            if difference := found.get(model, {}).get(group):
                said = f"{signed(difference.value, row.unit)} ({bounds(difference, row.unit)})"
                cell = replace(cell, sub=f"{cell.sub}; Δ {said}")
            cells.append(cell)
        lines.append((language(group), cells))
    return lines


def _part(score: Score, group: str) -> Score | None:
    found = score.detail.get("by_group", {}).get(group)
    return Score(group, found["value"], score.unit, found["lo"], found["hi"], found["n"]) if found else None


def published_tables(
    rows: Sequence[ComparedItem],
) -> list[tuple[str, str, list[str], list[tuple[str, str, list[str]]]]]:
    """(title, where and when, models, rows of (task, setting, scores)) for every source and kind that has some."""
    tables: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        for score in row.published:
            tables.setdefault((score.source.name, score.kind), []).append((row.task, score))
    out = []
    for (_, kind), found in tables.items():
        source = found[0][1].source
        models = list(dict.fromkeys(score.model for _, score in found))
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for task, score in found:
            setting = score.setting.removesuffix(" (another setting)")
            lines.setdefault((task, setting), {})[score.model] = (
                f"{score.score:g}{'*' if score.starred else ''}"
            )
        listed = [
            (task, setting, [cells.get(m, "–") for m in models]) for (task, setting), cells in lines.items()
        ]
        out.append((f"{source.title} ({kind} models)", f"{source.where}, {source.date}", models, listed))
    return out


def heat_maps(comparison: Comparison) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Length and depth of every task that has them, a map a model."""
    out = []
    for row in comparison.rows:
        maps = []
        for model, score in row.scores.items():
            grid = score.detail.get("grid") if score else None
            if grid:
                lengths = [f"{n:,}" for n in sorted({cell["length"] for cell in grid})]
                depths = [f"{100 * d:.0f} %" for d in sorted({cell["depth"] for cell in grid})]
                cells = {(f"{c['length']:,}", f"{100 * c['depth']:.0f} %"): c["value"] for c in grid}
                drawn = charts.heat_map(cells, lengths, depths, label=f"{row.title}, {model}", x_title="length, tokens",
                                        y_title="depth")  # fmt: skip
                maps.append((model, Markup(drawn)))
        if maps:
            out.append((row.title, maps))
    return out


def score_chart(row: ComparedItem, tones: Mapping[str, str]) -> str:
    """Scores with their intervals, a line a model."""
    lines = [
        charts.ChartRow(
            m, s.value * _scale(s), _scaled(s.lo, s), _scaled(s.hi, s), tones[m], number(s.value, s.unit)
        )
        for m, s in row.scores.items()
        if s is not None
    ]
    if len(lines) < 2:
        return ""
    title = f"{row.title}: {row.metric}, {unit_title(row.unit)}"
    return charts.interval_chart(
        lines, label=row.title, title=title, decimals=1 if row.unit == "fraction" else 3
    )


def _scale(score: Score) -> float:
    return 100.0 if score.unit == "fraction" else 1.0


def _scaled(value: float | None, score: Score) -> float | None:
    return None if value is None else value * _scale(score)


def _find(comparison: Comparison, row: ComparedItem, model: str) -> Difference | None:
    """``model`` minus the first one."""
    return next((d for d in comparison.differences
                 if (d.task, d.first, d.second) == (row.title, model, comparison.models[0])), None)  # fmt: skip


def as_markdown(comparison: Comparison) -> str:
    """Scores, differences from the first model, verdicts."""
    models, reference = comparison.models, comparison.models[0]
    parts = [f"# {', '.join(models)}", "Scores with their 95 % intervals."]
    for some in filter(None, (comparison.rows, comparison.further)):
        rows = [
            [row.title, row.metric.replace("_", " "), unit_title(row.unit),
             *(f"{c.text} [{c.sub}]" if c.sub else c.text for c in cells)]
            for row, cells in score_rows(some, models)
        ]  # fmt: skip
        parts.append(markdown(["task", "metric", "unit", *models], rows, left=3))
    if len(models) > 1:
        n = len(comparison.differences)
        parts.append(
            f"Paired differences from {reference}; **bold** ones stand by Holm's procedure over all {n}."
        )
        rows = []
        for row in comparison.rows:
            found = [_find(comparison, row, m) for m in models[1:]]
            if any(found):
                rows.append([row.title, unit_title(row.unit), *map(_markdown_difference, found)])
        parts.append(markdown(["task", "unit", *models[1:]], rows, left=2))
    for title, where, columns, lines in published_tables(comparison.rows):
        parts.append(f"**Published under other settings, not measured here:** {title}. {where}. Percent.")
        parts.append(
            markdown(["task", "setting", *columns], [[t, s, *cells] for t, s, cells in lines], left=2)
        )
    parts += [f"- “{v.claim.said}”: **{v.verdict}** ({len(v.wins)} ahead, {len(v.losses)} behind, {len(v.ties)} within "
              f"the noise){'; ' + v.own if v.own else ''}" for v in comparison.verdicts]  # fmt: skip
    missing = [f"- {row.title}, {', '.join(some)}: {why}" for row, some, why in not_run(comparison)]
    if missing:
        parts += ["Not run:", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def _markdown_difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    cell = difference_cell(found)
    text = f"**{cell.text}**" if found.stands else cell.text
    return f"{text} [{bounds(found.interval, found.unit)}]"


def as_csv(comparison: Comparison) -> str:
    """A line for every score and every part of it; empty cells where there is no number."""
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
