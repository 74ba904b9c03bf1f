"""Draw the charts of the report page from a run. A chart without any data is "" or an empty list."""

from __future__ import annotations

from collections.abc import Sequence

from ..units import duration, fixed
from . import charts
from .languages import in_order, language
from .palette import tone
from .run import Run
from .tabulate import stage_tone

TOOL_BAR = 80.0  # percent of held-out English items that the instruct model of a full run must answer


def loss_charts(run: Run) -> list[tuple[str, str, str]]:
    """Return the title and two drawings of each training, with a logarithmic and with a linear x axis.

    The student and its control share a frame. If both have held-out losses, only those are drawn, since their
    training losses are different quantities.
    """
    pair = [curve for name in ("student", "control") if (curve := run.curve(name))]
    groups = [[curve] for stage in run.stages for curve in stage.curves if curve not in pair]
    groups += [pair] if pair else []
    drawings: list[tuple[str, list[charts.Line]]] = []
    for group in groups:
        lines = [line for curve in group for line in charts.loss_lines(curve.name, curve.train, curve.evals)]
        if len(group) > 1 and all(curve.evals for curve in group):
            lines = [line for line in lines if not line.faint]
        lines.sort(key=lambda line: not line.faint)  # raw curves are drawn first, behind the others
        drawings.append((" and ".join(curve.name for curve in group), lines))
    right = max((charts.label_room(lines) for _, lines in drawings), default=0.0)

    def draw(title: str, lines: list[charts.Line], x_log: bool) -> str:
        label, x_title = f"Loss of {title}", "tokens, logarithmic" if x_log else "tokens"
        y_title = "loss, nats/token"
        return charts.line_chart(
            lines, label=label, x_title=x_title, y_title=y_title, x_log=x_log, right=right
        )

    drawn = [(title, draw(title, lines, True), draw(title, lines, False)) for title, lines in drawings]
    return [(title, log, linear) for title, log, linear in drawn if log and linear]


def copying_chart(run: Run) -> str:
    """Draw the accuracy of copying and looking up over the recipes of the teacher and the longer contexts."""
    points: dict[str, list[tuple[float, float]]] = {}
    before = 0.0
    for stage in run.stages:
        for curve in stage.curves if stage.name in ("teacher", "long") else []:
            for asked, values in curve.accuracies.items():
                points.setdefault(asked, []).extend((before + x, 100 * y) for x, y in values)
            before += curve.train[-1][0] if curve.train else 0.0
    colours = {"copy": "teacher", "lookup": "long", "needles": "instruct"}
    lines = [
        charts.Line(asked, of, colours.get(asked, "none"), dots=len(of) <= 60) for asked, of in points.items()
    ]
    label, y_title = "Accuracy of copying and looking up", "right, %"
    return charts.line_chart(lines, label=label, x_title="tokens", y_title=y_title, x_log=False)


def bpb_chart(run: Run) -> str:
    """Draw the bits per byte of every model with its interval."""
    scores = [score for model in run.models if (score := run.score(model, "bpb"))]
    rows = [
        charts.ChartRow(score.model, e.value, e.lo, e.hi, tone(score.model), fixed(e.value, 3))
        for score, e in ((score, score.estimate) for score in scores)
    ]
    title = "bits per byte on held-out text, less is better"
    return charts.interval_chart(rows, label="Bits per byte", title=title)


def tools_chart(run: Run) -> str:
    """Draw the instruct model's tool use by language, with the bar of a full run for English."""
    score = run.score("instruct", "tool_use")
    if score is None:
        return ""

    def percent(fraction: float | None) -> float | None:
        return None if fraction is None else 100 * fraction

    by_lang, colour = score.detail.get("by_lang", {}), tone("instruct")
    rows = [
        charts.ChartRow(
            language(code), 100 * e.value, percent(e.lo), percent(e.hi), colour, fixed(100 * e.value, 0)
        )
        for code, e in ((code, by_lang[code]) for code in in_order(by_lang))
    ]
    full = run.plan.get("mode") == "full"
    return charts.interval_chart(
        rows, label="Tool use of instruct by language, percent", title="" if full else "instruct, %",
        decimals=0, low=0, high=100, bar=TOOL_BAR if full else None,
        bar_label=f"bar for English: {TOOL_BAR:.0f} %",
    )  # fmt: skip


def needle_maps(run: Run) -> list[tuple[str, str]]:
    """Return each model with needle scores, and its heat map by length and depth, or by length alone."""
    drawn = []
    for model in run.models:
        score, label = run.score(model, "needle"), f"Needle accuracy of {model} by length and depth"
        if score and score.grid:
            drawn.append((model, charts.length_depth_map(score.grid, label=label)))
            continue
        parts = score.detail.get("by_length", {}) if score else {}
        by_length = {int(key): part.value for key, part in parts.items() if key.isdigit()}
        if by_length:
            values = {(f"{length:,}", "all"): by_length[length] for length in sorted(by_length)}
            columns = [column for column, _ in values]
            titles = {"x_title": "length, tokens", "y_title": ""}
            drawn.append((model, charts.heat_map(values, columns, ["all"], label=label, **titles)))
    return drawn


def time_bar(run: Run) -> str:
    """Draw the time of each stage as parts of a bar, with the predicted times in a second bar."""

    def parts(key: str) -> list[tuple[str, float, str]]:
        return [(stage.name, getattr(stage, key) or 0.0, stage_tone(stage)) for stage in run.stages]

    rows: list[tuple[str, Sequence[tuple[str, float, str]]]] = [("measured", parts("seconds"))]
    if any(stage.predicted_seconds for stage in run.stages):
        rows.append(("predicted", parts("predicted_seconds")))
    return charts.divided_bar(rows, label="Time by stage", show=duration)
