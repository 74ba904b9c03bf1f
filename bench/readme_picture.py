"""Draw a run for the README: family tree, loss curves and scores in one SVG, for light and for dark mode.

GitHub shows SVG files as images. They cannot use the page's style sheet nor, reliably, the reader's colour
scheme. So each file has its own background and styles with every colour written out, and the README chooses
by ``<picture>``.
"""

from __future__ import annotations

import re
from pathlib import Path

from herd.files import write_atomically
from herd.report import figures, svg, tree
from herd.report.page import facts, headline
from herd.report.palette import CHART_CSS, DARK, LIGHT
from herd.report.run import Run
from herd.report.svg import tag, text

WIDTH, MARGIN, GUTTER = 1180.0, 40.0, 48.0
_SERIF = "'Iowan Old Style', 'Palatino Linotype', Palatino, Georgia, serif"


def write_pictures(run: Run, folder: Path | str) -> list[Path]:
    """Write ``report-light.svg`` and ``report-dark.svg`` into a folder and return their paths."""
    paths = []
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        paths.append(Path(folder) / f"report-{name}.svg")
        write_atomically(paths[-1], picture(run, colours) + "\n")
    return paths


def picture(run: Run, colours: dict[str, str]) -> str:
    """One SVG of the run. Parts that were not measured are left out."""
    inner = WIDTH - 2 * MARGIN
    half = (inner - GUTTER) / 2
    parts = [
        text(MARGIN, 84, headline(run), style=f"font: 600 40px {_SERIF}; fill: var(--ink)"),
        text(MARGIN, 114, "  ·  ".join(facts(run)), style="font-size: 14px; white-space: pre"),
    ]
    y = 150.0
    if root := tree.family(run):
        drawn, height = _placed(tree.wide(root), MARGIN, y, inner)
        parts.append(drawn)
        y += height + 40
    losses = {title: log for title, log, _ in figures.loss_charts(run)}
    charts: list[tuple[str, str]] = [
        (title, losses.get(title, "")) for title in ("teacher", "student and control")
    ]
    charts += [("bits per byte", figures.bpb_chart(run)), ("tool use by language", figures.tools_chart(run))]
    shown = [(title, chart) for title, chart in charts if chart]
    for index in range(0, len(shown), 2):
        tallest = 0.0
        for place, (title, chart) in enumerate(shown[index : index + 2]):
            x = MARGIN + place * (half + GUTTER)
            parts.append(text(x, y + 6, title, class_="big"))
            drawn, height = _placed(chart, x, y + 24, half)
            parts.append(drawn)
            tallest = max(tallest, height)
        y += tallest + 64
    return _standalone(
        "".join(parts), y - 24 + MARGIN, colours, f"{headline(run)}: family tree, losses and scores"
    )


def _placed(drawing: str, x: float, y: float, width: float) -> tuple[str, float]:
    """A drawing set into a larger one, as wide as asked but never enlarged. Returns it with its height."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    if found is None:
        raise ValueError("a drawing has no viewBox")
    own_width, own_height = float(found[1]), float(found[2])
    scale = min(1.0, width / own_width)
    size = f'x="{x:g}" y="{y:g}" width="{own_width * scale:.2f}" height="{own_height * scale:.2f}" overflow="visible"'
    return drawing.replace("<svg ", f"<svg {size} ", 1), own_height * scale


def _standalone(body: str, height: float, colours: dict[str, str], label: str) -> str:
    background = tag(
        "rect", width=WIDTH, height=height, rx=12, style="fill: var(--paper); stroke: var(--line)"
    )
    whole = svg.drawing(WIDTH, height, tag("style", CHART_CSS.replace("svg ", "")) + background + body, label)
    whole = whole.replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:g}" height="{height:g}" ', 1
    )

    def written(found: re.Match[str]) -> str:
        return colours.get(found[1], found[2] or "")

    return re.sub(r"var\(--([\w-]+)(?:, ([^()]*))?\)", written, whole)
