"""Draw the charts of a report: lines, intervals, a heat map, a divided bar.

Each takes data and returns SVG text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean

from ..units import fixed, si
from . import svg
from .palette import tone
from .svg import tag, text

Point = tuple[float, float]
Scale = Callable[[float], float]
"""A map from data to pixels."""
WIDTH = 520  # of charts of curves and intervals in pixels
MAX_POINTS = 400  # a curve is thinned to this many: more cannot be seen and make the page heavy


@dataclass(frozen=True)
class Line:
    """A curve.

    ``faint``: raw, noisy data behind the main curve, without a label. ``dots``: a mark at each point.
    """

    label: str
    points: Sequence[Point]
    tone: str
    faint: bool = False
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class ChartRow:
    """A row of an interval chart. Numbers that were not measured are None."""

    label: str
    value: float | None
    lo: float | None
    hi: float | None
    tone: str
    shown: str  # the number in words, printed on the right


def line_chart(
    lines: Sequence[Line], *, label: str, x_title: str, y_title: str, x_log: bool, y_log: bool = False,
    x_unit: str = "tokens", right: float | None = None, width: int = WIDTH, height: int = 300,
) -> str:  # fmt: skip
    """Draw curves in one frame, each named at its right end.

    ``right`` is the margin for the names in pixels (None: as wide as they need). Give charts below each other
    the same one. ``x_unit`` is the unit of x in the tooltip of a dot. A logarithmic axis leaves out points at
    0. Values on a logarithmic y axis are written with SI prefixes.
    """
    lines = [_visible(line, x_log, y_log) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    named = [line for line in lines if not line.faint]
    left, top, foot = 46, 26, height - 42
    end = width - (label_room(named) if right is None else right)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = min(xs), max(xs)
    pad = _pad(min(ys), max(ys))
    y_low, y_high = (min(ys) / 1.3, max(ys) * 1.3) if y_log else (min(ys) - pad, max(ys) + pad)
    to_x, to_y = _scale(x_low, x_high, left, end, x_log), _scale(y_low, y_high, foot, top, y_log)

    def shown(value: float, decimals: int = 3) -> str:
        return si(value, digits=2) if y_log else fixed(value, decimals)

    parts = []
    y_ticks = svg.log_ticks(y_low, y_high) if y_log else svg.linear_ticks(y_low, y_high)
    for tick in y_ticks:
        parts.append(tag("line", x1=left, x2=end, y1=to_y(tick), y2=to_y(tick), class_="grid"))
        parts.append(text(left - 8, to_y(tick) + 4, shown(tick, svg.decimals_for(y_ticks)), "end", "num"))
    for tick in svg.log_ticks(x_low, x_high) if x_log else svg.linear_ticks(x_low, x_high, 4):
        parts.append(tag("line", x1=to_x(tick), x2=to_x(tick), y1=foot, y2=foot + 4, class_="axis"))
        parts.append(text(to_x(tick), foot + 18, si(tick, digits=2), "middle", "num"))
    parts.append(tag("line", x1=left, x2=end, y1=foot, y2=foot, class_="axis"))
    parts.append(text(0, 12, y_title, class_="faint"))
    parts.append(text(end, height - 6, x_title, "end", "faint"))
    parts += [_curve(line, to_x, to_y, lambda x, y: f"{si(x)} {x_unit}: {shown(y)}") for line in lines]
    last = [line.points[-1] for line in named]
    label_ys = svg.spread([to_y(y) for _, y in last], 16, top + 4, foot)
    for line, (x, y), label_y in zip(named, last, label_ys, strict=True):
        soft = "fill: var(--soft); font-weight: 400"
        name = escape(line.label) + tag("tspan", shown(y), class_="num", dx=6, style=soft)
        style = f"{_fill(line.tone)}; font-weight: 600"
        parts.append(tag("text", name, x=to_x(x) + 10, y=label_y + 4, style=style))
    ending = "; ".join(f"{line.label} ends at {shown(y)}" for line, (_, y) in zip(named, last, strict=True))
    return svg.drawing(width, height, "".join(parts), f"{label}: {ending}")


def label_room(lines: Sequence[Line]) -> float:
    """Return the width in pixels of the names and last values on the right of curves."""
    return max((svg.text_width(line.label) for line in lines if not line.faint), default=0) + 60


def interval_chart(
    rows: Sequence[ChartRow], *, label: str, title: str, bar: float | None = None, bar_label: str = "",
    decimals: int = 2, low: float | None = None, high: float | None = None,
) -> str:  # fmt: skip
    """Draw a dot with its interval in each row, and the number on the right.

    ``bar`` is a value to reach, drawn as a dashed line.
    """
    known = [row for row in rows if row.value is not None]
    if not known:
        return ""
    width, left = WIDTH, max(svg.text_width(row.label) for row in rows) + 16
    right = max(svg.text_width(row.shown) for row in rows) + 14
    step, top = 26, 30
    foot = top + step * len(rows)
    ends = [end for row in known for end in (row.value, row.lo, row.hi, bar) if end is not None]
    pad = _pad(min(ends), max(ends))
    low = min(ends) - pad if low is None else low
    high = max(ends) + pad if high is None else high
    to_x = _scale(low, high, left, width - right, False)
    parts = [text(left, 12, title, class_="faint")]
    ticks = svg.linear_ticks(low, high, 4)
    tick_decimals = min(decimals, svg.decimals_for(ticks))
    for tick in ticks:
        parts.append(tag("line", x1=to_x(tick), x2=to_x(tick), y1=top - 8, y2=foot, class_="grid"))
        parts.append(text(to_x(tick), foot + 16, fixed(tick, tick_decimals), "middle", "num"))
    if bar is not None:
        parts.append(tag("line", x1=to_x(bar), x2=to_x(bar), y1=top - 8, y2=foot, class_="bar"))
        parts.append(text(to_x(bar), top - 12, bar_label, "middle", "strong"))
    for index, row in enumerate(rows):
        y = top + step * index + step / 2 - 4
        parts.append(text(left - 12, y + 4, row.label, "end", "strong"))
        parts.append(text(width, y + 4, row.shown, "end", "num"))
        if row.value is None:
            continue
        if row.lo is not None and row.hi is not None:
            look = {"stroke_width": 5, "stroke_linecap": "round", "opacity": 0.35, "style": _stroke(row.tone)}
            parts.append(tag("line", x1=to_x(row.lo), x2=to_x(row.hi), y1=y, y2=y, **look))
        parts.append(tag("circle", cx=to_x(row.value), cy=y, r=4.5, style=_fill(row.tone)))
    described = "; ".join(f"{row.label} {row.shown}" for row in rows)
    return svg.drawing(width, foot + 26, "".join(parts), f"{label}: {described}")


def heat_map(
    cells: dict[tuple[str, str], float], columns: Sequence[str], rows: Sequence[str], *, label: str,
    x_title: str, y_title: str,
) -> str:  # fmt: skip
    """Draw fractions 0..1 by (column, row) with the percentage in each cell. A missing value is a dash."""
    left, top, step = max(svg.text_width(row) for row in rows) + 14, 24, 30
    cell = min((340 - left) / max(1, len(columns)), 96.0)  # a few columns do not become wide
    foot = top + step * len(rows)
    parts = [text(0, 12, y_title, class_="faint")]
    for r, row in enumerate(rows):
        y = top + r * step
        parts.append(text(left - 8, y + step / 2 + 4, row, "end", "num"))
        for c, column in enumerate(columns):
            x, value = left + c * cell, cells.get((column, row))
            strength = 0.0 if value is None else 0.04 + 0.86 * min(max(value, 0.0), 1.0)
            look: dict[str, object] = {"class_": "cell", "fill_opacity": strength}
            if value is None:
                look = {"style": "fill: none; stroke: var(--line)"}
            parts.append(tag("rect", x=x + 1, y=y + 1, width=cell - 2, height=step - 2, rx=3, **look))
            shown = "–" if value is None else fixed(100 * value, 0)
            class_ = "on" if strength > 0.62 else "off"
            parts.append(text(x + cell / 2, y + step / 2 + 4, shown, "middle", f"num {class_}"))
    for c, column in enumerate(columns):
        parts.append(text(left + (c + 0.5) * cell, foot + 16, column, "middle", "num"))
    end = max(left + cell * len(columns), left + svg.text_width(x_title))
    parts.append(text(end, foot + 34, x_title, "end", "faint"))
    described = "; ".join(f"{c} at {r}: {fixed(100 * v, 0)} %" for (c, r), v in cells.items())
    return svg.drawing(340, foot + 40, "".join(parts), f"{label}: {described}")


def length_depth_map(grid: Sequence[tuple[int, float, float]], *, label: str) -> str:
    """Draw a heat map of (length in tokens, depth 0..1, fraction) entries."""
    lengths, depths = (sorted({entry[i] for entry in grid}) for i in (0, 1))
    return heat_map(
        {(f"{length:,}", fixed(100 * depth, 0)): value for length, depth, value in grid},
        [f"{length:,}" for length in lengths],
        [fixed(100 * depth, 0) for depth in depths],
        label=label,
        x_title="length, tokens",
        y_title="depth of the fact in the text, %",
    )


def divided_bar(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], *, label: str, show: Callable[[float], str]
) -> str:
    """Draw bars on one scale, each divided into (name, size, colour) parts. Wide parts show their names."""
    totals = [sum(size for _, size, _ in parts) for _, parts in rows]
    if max(totals, default=0) <= 0:
        return ""
    left = max(svg.text_width(title) for title, _ in rows) + 16
    right = max(svg.text_width(show(total)) for total in totals) + 14
    step, thick, width = 44, 30, 1080
    drawn = []
    for index, ((title, parts), total) in enumerate(zip(rows, totals, strict=True)):
        y, x = index * step + 4, left
        middle = y + thick / 2 + 4
        drawn.append(text(left - 12, middle, title, "end", "strong"))
        for name, size, colour in parts:
            wide = (width - left - right) * size / max(totals)
            look = {"style": _fill(colour), "fill_opacity": 0.4 if index else 0.85}
            tooltip = tag("title", escape(f"{name}: {show(size)}"))
            drawn.append(tag("rect", tooltip, x=x, y=y, width=max(0.0, wide - 2), height=thick, rx=3, **look))
            if wide > svg.text_width(name) + 14:
                class_ = "off" if index or colour == "none" else "on"
                drawn.append(text(x + wide / 2 - 1, middle, name, "middle", class_))
            x += wide
        drawn.append(text(x + 8, middle, show(total), class_="strong num"))
    texts = (f"{title}: " + ", ".join(f"{n} {show(s)}" for n, s, _ in parts) for title, parts in rows)
    described = "; ".join(texts)
    return svg.drawing(width, step * len(rows), "".join(drawn), f"{label}: {described}", "chart time")


def loss_lines(name: str, train: Sequence[Point], evals: Sequence[Point]) -> list[Line]:
    """Return the curves of a training: held-out loss in front of training loss, or training loss alone."""
    colour = tone(name)
    dashed = colour == "control"
    lines = [Line(name, thin(train), colour, faint=bool(evals), dashed=dashed and not evals)] if train else []
    return [*lines, Line(name, evals, colour, dots=len(evals) <= 40, dashed=dashed)] if evals else lines


def thin(points: Sequence[Point]) -> list[Point]:
    """Average groups of neighbours so that at most `MAX_POINTS` points remain."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _pad(low: float, high: float) -> float:
    """Return the space above and below the data. A flat curve has some too."""
    return max(0.05 * (high - low), 1e-3 * abs(high), 1e-6)


def _visible(line: Line, x_log: bool, y_log: bool) -> Line:
    points = [(x, y) for x, y in line.points if (x > 0 or not x_log) and (y > 0 or not y_log)]
    return replace(line, points=points)


def _curve(line: Line, to_x: Scale, to_y: Scale, describe: Callable[[float, float], str]) -> str:
    points = [(to_x(x), to_y(y)) for x, y in line.points]
    classes = ("raw" if line.faint else "curve") + (" dash" if line.dashed else "")
    drawn = tag("path", d=svg.path(points), class_=classes, style=_stroke(line.tone))
    for (x, y), point in zip(points, line.points, strict=True) if line.dots else ():
        tooltip = tag("title", escape(f"{line.label}, {describe(*point)}"))
        drawn += tag("circle", tooltip, cx=x, cy=y, r=2.8, style=_fill(line.tone))
    return drawn


def _fill(colour: str) -> str:
    return f"fill: var(--{colour})"


def _stroke(colour: str) -> str:
    return f"stroke: var(--{colour})"


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Scale:
    if log:
        low, high = math.log10(low), math.log10(high)
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * ((math.log10(value) if log else value) - low) / span
