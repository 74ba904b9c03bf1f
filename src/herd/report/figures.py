"""The charts of the page: which curves share a frame, which numbers stand in a map. "" where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence

from . import charts
from .palette import tone
from .run import ModelScore, Run
from .units import duration, fixed, in_order, language

TOOL_BAR = 80.0  # percent of held-out English items that the instruct model of a full herd must answer


def loss_charts(run: Run) -> list[tuple[str, str, str]]:
    """(title, logarithmic, linear) drawings. The student and its control share one frame, in which only held-out losses
    stand if there are any: what they minimize is not the same quantity."""
    pair = [curve for name in ("student", "control") if (curve := run.curve(name))]
    groups = [[curve] for stage in run.stages for curve in stage.curves if curve not in pair]
    groups += [pair] if pair else []
    drawings: list[tuple[str, list[charts.Line]]] = []
    for group in groups:
        lines = [line for curve in group for line in charts.loss_lines(curve.name, curve.train, curve.evals)]
        if len(group) > 1 and all(curve.evals for curve in group):
            lines = [line for line in lines if not line.faint]
        lines.sort(key=lambda line: not line.faint)  # raw curves behind the ones that count
        drawings.append((" and ".join(curve.name for curve in group), lines))
    right = max((charts.label_room(lines) for _, lines in drawings), default=0.0)

    def draw(title: str, lines: list[charts.Line], x_log: bool, x_title: str) -> str:
        return charts.line_chart(
            lines,
            label=f"Loss of {title}",
            x_title=x_title,
            y_title="loss, nats/token",
            x_log=x_log,
            right=right,
        )

    drawn = [
        (t, draw(t, ls, True, "tokens, logarithmic"), draw(t, ls, False, "tokens")) for t, ls in drawings
    ]
    return [(title, log, linear) for title, log, linear in drawn if log and linear]


def bpb_chart(run: Run) -> str:
    rows = []
    for model in run.models:
        if score := run.score(model, "bpb"):
            found = score.estimate
            rows.append(
                charts.ChartRow(model, found.value, found.lo, found.hi, tone(model), fixed(found.value, 3))
            )
    return charts.interval_chart(
        rows, label="Bits per byte", title="bits per byte on held-out text, less is better"
    )


def tools_chart(run: Run, model: str = "instruct") -> str:
    """Tool use by language; the bar that English has to reach stands only for the full herd."""
    score = run.score(model, "tool_use")
    if score is None:
        return ""
    colour, by_lang = tone(model), score.detail.get("by_lang", {})
    rows = [
        charts.ChartRow(
            language(code), 100 * e.value, _percent(e.lo), _percent(e.hi), colour, fixed(100 * e.value, 0)
        )
        for code, e in ((code, by_lang[code]) for code in in_order(by_lang))
    ]
    label = f"Tool use of {model} by language, percent"
    if run.plan.get("mode") != "full":
        return charts.interval_chart(rows, label=label, title=f"{model}, %", decimals=0, low=0, high=100)
    return charts.interval_chart(
        rows,
        label=label,
        title="",
        bar=TOOL_BAR,
        bar_label="bar for English: 80 %",
        decimals=0,
        low=0,
        high=100,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def needle_maps(run: Run) -> list[tuple[str, str]]:
    """(model, heat map of length × depth) of every model with a grid, or with lengths only."""
    drawn = []
    for model in run.models:
        score = run.score(model, "needle")
        if score is None:
            continue
        values, columns, rows = _grid(score)
        if values:
            label = f"Needle accuracy of {model} by length and depth"
            y_title = "depth of the fact in the text, %" if len(rows) > 1 else ""
            drawn.append(
                (
                    model,
                    charts.heat_map(
                        values, columns, rows, label=label, x_title="length, tokens", y_title=y_title
                    ),
                )
            )
    return drawn


def _grid(score: ModelScore) -> tuple[dict[tuple[str, str], float], list[str], list[str]]:
    if score.grid:
        lengths = sorted({length for length, _, _ in score.grid})
        depths = sorted({depth for _, depth, _ in score.grid})
        values = {(f"{length:,}", fixed(100 * depth, 0)): value for length, depth, value in score.grid}
        return values, [f"{length:,}" for length in lengths], [fixed(100 * depth, 0) for depth in depths]
    by_length = {
        int(key): found.value for key, found in score.detail.get("by_length", {}).items() if key.isdigit()
    }
    columns = [f"{length:,}" for length in sorted(by_length)]
    return {(f"{length:,}", "all"): value for length, value in by_length.items()}, columns, ["all"]


def time_bar(run: Run) -> str:
    def parts(key: str) -> list[tuple[str, float, str]]:
        return [
            (stage.name, getattr(stage, key) or 0.0, tone(stage.model_name) if stage.model_name else "none")
            for stage in run.stages
        ]

    rows: list[tuple[str, Sequence[tuple[str, float, str]]]] = [("measured", parts("seconds"))]
    if any(stage.predicted_seconds for stage in run.stages):
        rows.append(("predicted", parts("predicted_seconds")))
    return charts.divided_bar(rows, label="Time by stage", show=duration)
