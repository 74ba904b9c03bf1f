"""The charts of a report: lines, intervals, a heat map, a divided bar. Each takes data and gives SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from . import svg
from .palette import tone
from .svg import tag, text
from .units import fixed, si

Point = tuple[float, float]
MAX_POINTS = 400  # a curve is thinned to this many: more cannot be seen and make the page heavy


@dataclass(frozen=True)
class Line:
    """One curve. ``faint``: raw, noisy data behind the curve that counts, not labelled. ``dots``: mark each point."""

    label: str
    points: Sequence[Point]
    tone: str
    faint: bool = False
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class ChartRow:
    """One line of an interval chart; ``lo`` and ``hi`` None if there is no interval, ``value`` None if not measured."""

    label: str
    value: float | None
    lo: float | None
    hi: float | None
    tone: str
    shown: str  # the number in words, printed at the right


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_title: str,
    y_title: str,
    x_log: bool,
    y_log: bool = False,
    x_unit: str = "tokens",
    right: float | None = None,
    width: int = 520,
    height: int = 300,
) -> str:
    """Curves over a shared frame, each named at its right end in a margin of ``right`` pixels (None: as the names need;
    charts that stand below each other want the same). A logarithmic axis has no place for points at 0; values on one
    are written with prefixes. ``x_unit`` is what the pointer reads beside a dot."""
    lines = [_visible(line, x_log, y_log) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    named = [line for line in lines if not line.faint]
    right = label_room(named) if right is None else right
    left, top, bottom = 46, 26, 42
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(ys) / 1.3, max(ys) * 1.3) if y_log else _padded(ys)
    to_x = _scale(x_low, x_high, left, width - right, x_log)
    to_y = _scale(y_low, y_high, height - bottom, top, y_log)

    parts = []
    y_ticks = svg.log_ticks(y_low, y_high) if y_log else svg.linear_ticks(y_low, y_high)
    places = svg.decimals_for(y_ticks)

    def shown(value: float, decimals: int = 3) -> str:
        return si(value, digits=2) if y_log else fixed(value, decimals)

    for tick in y_ticks:
        y = to_y(tick)
        parts.append(tag("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        parts.append(text(left - 8, y + 4, shown(tick, places), "end", "num"))
    x_ticks = svg.log_ticks(x_low, x_high) if x_log else svg.linear_ticks(x_low, x_high, 4)
    for tick in x_ticks:
        x = to_x(tick)
        parts.append(tag("line", x1=x, x2=x, y1=height - bottom, y2=height - bottom + 4, class_="axis"))
        parts.append(text(x, height - bottom + 18, si(tick, digits=2), "middle", "num"))
    parts.append(
        tag("line", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom, class_="axis")
    )
    parts.append(text(0, 12, y_title, class_="faint"))
    parts.append(text(width - right, height - 6, x_title, "end", "faint"))

    for line in lines:
        parts.append(_curve(line, to_x, to_y, lambda x, y: f"{si(x)} {x_unit}: {shown(y)}"))
    ends = svg.spread([to_y(line.points[-1][1]) for line in named], 16, top + 4, height - bottom)
    for line, y in zip(named, ends, strict=True):
        x = to_x(line.points[-1][0]) + 10
        value = tag(
            "tspan",
            shown(line.points[-1][1]),
            class_="num",
            dx=6,
            style="fill: var(--soft); font-weight: 400",
        )
        parts.append(
            tag(
                "text",
                escape(line.label) + value,
                x=x,
                y=y + 4,
                style=f"fill: var(--{line.tone}); font-weight: 600",
            )
        )
    ending = "; ".join(f"{line.label} ends at {shown(line.points[-1][1])}" for line in named)
    return svg.drawing(width, height, "".join(parts), f"{label}: {ending}")


def label_room(lines: Sequence[Line]) -> float:
    """Pixels that the names and last values of curves need at the right."""
    return max((svg.text_width(line.label) for line in lines if not line.faint), default=0) + 60


def interval_chart(
    rows: Sequence[ChartRow], *, label: str, title: str, bar: float | None = None, bar_label: str = "",
    decimals: int = 2, low: float | None = None, high: float | None = None, width: int = 520,
) -> str:  # fmt: skip
    """A dot with its interval a row, the number at the right; ``bar`` draws a dashed line that had to be reached."""
    known = [row for row in rows if row.value is not None]
    if not known:
        return ""
    left = max(svg.text_width(row.label) for row in rows) + 16
    right = max(svg.text_width(row.shown) for row in rows) + 14
    step, top = 26, 30
    height = top + step * len(rows) + 26
    ends = [end for row in known for end in (row.value, row.lo, row.hi) if end is not None]
    ends += [] if bar is None else [bar]
    pad = _pad(min(ends), max(ends))
    low = min(ends) - pad if low is None else low
    high = max(ends) + pad if high is None else high
    to_x = _scale(low, high, left, width - right, False)
    foot = top + step * len(rows)
    parts = [text(left, 12, title, class_="faint")]
    ticks = svg.linear_ticks(low, high, 4)
    for tick in ticks:
        parts.append(tag("line", x1=to_x(tick), x2=to_x(tick), y1=top - 8, y2=foot, class_="grid"))
        parts.append(
            text(to_x(tick), foot + 16, fixed(tick, min(decimals, svg.decimals_for(ticks))), "middle", "num")
        )
    if bar is not None:
        parts.append(tag("line", x1=to_x(bar), x2=to_x(bar), y1=top - 8, y2=foot, class_="bar"))
        parts.append(text(to_x(bar), top - 12, bar_label, "middle", "strong"))
    for index, row in enumerate(rows):
        y = top + step * index + step / 2 - 4
        parts.append(text(left - 12, y + 4, row.label, "end", "strong"))
        parts.append(text(width, y + 4, row.shown, "end", "num"))
        if row.value is None:
            continue
        colour = f"stroke: var(--{row.tone})"
        if row.lo is not None and row.hi is not None:
            parts.append(
                tag("line", x1=to_x(row.lo), x2=to_x(row.hi), y1=y, y2=y, stroke_width=5, stroke_linecap="round",
                    style=colour, opacity=0.35)
            )  # fmt: skip
        parts.append(tag("circle", cx=to_x(row.value), cy=y, r=4.5, style=f"fill: var(--{row.tone})"))
    said = "; ".join(f"{row.label} {row.shown}" for row in rows)
    return svg.drawing(width, height, "".join(parts), f"{label}: {said}")


def heat_map(
    cells: dict[tuple[str, str], float], columns: Sequence[str], rows: Sequence[str], *, label: str, x_title: str,
    y_title: str, width: int = 340,
) -> str:  # fmt: skip
    """Shares 0..1 by (column, row), percent printed in each cell; cells without a value stay empty with a dash."""
    left, top, bottom, step = max(svg.text_width(row) for row in rows) + 14, 24, 40, 30
    cell = min((width - left) / max(1, len(columns)), 96.0)  # few columns do not grow wide
    right = left + cell * len(columns)
    height = top + step * len(rows) + bottom
    parts = [text(0, 12, y_title, class_="faint")]
    for r, row in enumerate(rows):
        y = top + r * step
        parts.append(text(left - 8, y + step / 2 + 4, row, "end", "num"))
        for c, column in enumerate(columns):
            x = left + c * cell
            value = cells.get((column, row))
            strength = 0.0 if value is None else 0.04 + 0.86 * min(max(value, 0.0), 1.0)
            box: dict[str, object] = {"x": x + 1, "y": y + 1, "width": cell - 2, "height": step - 2, "rx": 3}
            if value is None:
                parts.append(tag("rect", **box, style="fill: none; stroke: var(--line)"))
            else:
                parts.append(tag("rect", **box, class_="cell", fill_opacity=strength))
            shown = "–" if value is None else fixed(100 * value, 0)
            parts.append(
                text(
                    x + cell / 2,
                    y + step / 2 + 4,
                    shown,
                    "middle",
                    f"num {'on' if strength > 0.62 else 'off'}",
                )
            )
    foot = top + step * len(rows)
    for c, column in enumerate(columns):
        parts.append(text(left + (c + 0.5) * cell, foot + 16, column, "middle", "num"))
    parts.append(text(max(right, left + svg.text_width(x_title)), foot + 34, x_title, "end", "faint"))
    said = "; ".join(f"{c} at {r}: {fixed(100 * v, 0)} %" for (c, r), v in cells.items())
    return svg.drawing(width, height, "".join(parts), f"{label}: {said}")


def divided_bar(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    *,
    label: str,
    show: Callable[[float], str],
    width: int = 1080,
) -> str:
    """Bars on one scale, each divided into (name, size, tone) parts; parts wide enough carry their name."""
    whole = max((sum(size for _, size, _ in parts) for _, parts in rows), default=0)
    if whole <= 0:
        return ""
    left = max(svg.text_width(title) for title, _ in rows) + 16
    right = max(svg.text_width(show(sum(size for _, size, _ in parts))) for _, parts in rows) + 14
    step, thick = 44, 30
    out = []
    for index, (title, parts) in enumerate(rows):
        y, x = index * step + 4, left
        out.append(text(left - 12, y + thick / 2 + 4, title, "end", "strong"))
        for name, size, colour in parts:
            wide = (width - left - right) * size / whole
            body = tag("title", escape(f"{name}: {show(size)}"))
            look: dict[str, object] = {
                "style": f"fill: var(--{colour})",
                "fill_opacity": 0.4 if index else 0.85,
            }
            out.append(tag("rect", body, x=x, y=y, width=max(0.0, wide - 2), height=thick, rx=3, **look))
            if wide > svg.text_width(name) + 14:
                out.append(
                    text(
                        x + wide / 2 - 1,
                        y + thick / 2 + 4,
                        name,
                        "middle",
                        "off" if index or colour == "none" else "on",
                    )
                )
            x += wide
        out.append(
            text(x + 8, y + thick / 2 + 4, show(sum(size for _, size, _ in parts)), class_="strong num")
        )
    said = "; ".join(f"{title}: " + ", ".join(f"{n} {show(s)}" for n, s, _ in parts) for title, parts in rows)
    return svg.drawing(width, step * len(rows), "".join(out), f"{label}: {said}", "chart time")


def loss_lines(
    name: str, train: Sequence[Point], evals: Sequence[Point], label: str | None = None
) -> list[Line]:
    """The two curves of one training: raw training loss behind, held-out loss (or, without one, training) in front."""
    colour = tone(name)
    dashed = colour == "control"
    lines = (
        [Line(label or name, thin(train), colour, faint=bool(evals), dashed=dashed and not evals)]
        if train
        else []
    )
    return lines + (
        [Line(label or name, evals, colour, dots=len(evals) <= 40, dashed=dashed)] if evals else []
    )


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` points: neighbours are averaged, which keeps the curve where it is and halves its noise."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low - _pad(low, high), high + _pad(low, high)


def _pad(low: float, high: float) -> float:
    """Room above and below the data; a flat curve gets some too."""
    return max(0.05 * (high - low), 1e-3 * abs(high), 1e-6)


def _visible(line: Line, x_log: bool, y_log: bool) -> Line:
    kept = [(x, y) for x, y in line.points if (x > 0 or not x_log) and (y > 0 or not y_log)]
    return Line(line.label, kept, line.tone, line.faint, line.dashed, line.dots)


def _curve(
    line: Line,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    read: Callable[[float, float], str],
) -> str:
    points = [(to_x(x), to_y(y)) for x, y in line.points]
    colour = f"stroke: var(--{line.tone})"
    classes = ("raw" if line.faint else "curve") + (" dash" if line.dashed else "")
    drawn = tag("path", d=svg.path(points), class_=classes, style=colour)
    if line.dots:
        for (x, y), point in zip(points, line.points, strict=True):
            body = tag("title", escape(f"{line.label}, {read(*point)}"))
            drawn += tag("circle", body, cx=x, cy=y, r=2.8, style=f"fill: var(--{line.tone})")
    return drawn


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """A map from data to pixels."""
    if log:
        low, high = math.log10(low), math.log10(high)
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * ((math.log10(value) if log else value) - low) / span
