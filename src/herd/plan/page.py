"""Render a training plan as one HTML page without scripts.

The page shows the parts of a step and of the memory, the runners-up, scaling over devices, KV cache by
context, and quality against bytes. It looks like the other pages (`herd.report.template`). Every number is
computed when the page is written, except the published fidelity of formats. Its source is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from markupsafe import Markup

from .. import units
from ..errors import PlanError
from ..llama.config import SIZES, ModelConfig
from ..report import charts
from ..report.template import template
from .layout import Job
from .memory import usable_memory
from .search import search
from .training import TrainPlan, default_batch
from .ways import GGUF_FORMATS, KLD_SOURCE

TONES = ("teacher", "long", "instruct", "student", "other", "control", "none", "accent", "good", "bad")
SHOWN = 8
"""Number of layouts in the table."""


class Breakdown(NamedTuple):
    """The parts of a total: a bar, and rows of (part, colour, amount, fraction)."""

    bar: Markup
    rows: list[tuple[str, str, str, str]]


def render_plan(plan: TrainPlan, title: str) -> str:
    """Return the HTML of the whole page."""
    days, cost = _scaling_charts(plan)
    return template("herd.plan", "plan.html.jinja").render(
        plan=plan,
        best=plan.best,
        money=plan.money,
        units=units,
        title=f"{title} on {plan.machine.name}",
        step=_breakdown("A step", plan.best.step.parts(), lambda value: f"{value:.3g} s"),
        memory=_breakdown("Memory", plan.best.nbytes.parts(), units.nbytes),
        layouts=[plan.best, *plan.others[: SHOWN - 1]],
        room=units.nbytes(usable_memory(plan.machine.device.memory)),
        days=days,
        cost=cost,
        context=_context_chart(),
        quality=_quality_chart(plan.job.config),
        quality_source=KLD_SOURCE,
    )


def _breakdown(label: str, parts: dict[str, float], show: Callable[[float], str]) -> Breakdown:
    """Return the breakdown of the parts that are not zero, largest first."""
    ordered = sorted(((value, name) for name, value in parts.items() if value > 0), reverse=True)
    whole = sum(value for value, _ in ordered)
    shown = [(name, value, TONES[i % len(TONES)]) for i, (value, name) in enumerate(ordered)]
    bar = charts.divided_bar([("", shown)], label=label, show=show)
    rows = [(name, tone, show(v), f"{100 * v / whole:.1f}") for name, v, tone in shown]
    return Breakdown(Markup(bar), rows)


def _scaling(plan: TrainPlan) -> list[tuple[int, float, float]]:
    """Return (devices, days, USD per million rented tokens or 0) for 1, 2, 4, … devices that suffice.

    The numbers of devices go up to the plan's own, and at least to 1,024.
    """
    job, found = plan.job, []
    rent = plan.money.rent_price.usd if plan.money.rent_price else 0.0
    most = max(plan.machine.count, 1024)
    for count in (1 << exponent for exponent in range(most.bit_length())):
        batch = max(default_batch(job.config, job.context, count), count)
        other = Job(job.config, batch, job.context, job.adapters, job.frozen_bytes)
        try:
            result = search(other, plan.machine.with_devices(count), precision=plan.best.layout.precision)
        except PlanError:
            continue
        if result.found:
            rate = result.best.tokens_per_s
            found.append((count, plan.tokens / rate / 86_400, rent * count * 1e6 / rate / 3600))
    return found


def _scaling_charts(plan: TrainPlan) -> tuple[Markup, Markup]:
    """Return charts of days by number of devices and of dollars by speed. Both are empty without points."""
    points = _scaling(plan)
    if len(points) < 2:
        return Markup(""), Markup("")
    times = charts.Line("days", [(count, time) for count, time, _ in points], "teacher", dots=True)
    titles = ("devices", "days")
    days = _line_chart([times], "days by devices", titles, x_log=True, y_log=True, x_unit="devices")
    rented = [(plan.tokens / time / 86_400, usd) for _, time, usd in points if usd]
    usd = charts.Line("USD", rented, "student", dots=True)
    titles = ("tokens per second", "USD per million tokens, rented")
    return days, _line_chart([usd], "cost against speed", titles, x_log=True, x_unit="tokens/s")


def _context_chart() -> Markup:
    """Return a chart of the bytes of the KV cache by context, for each published size."""
    contexts = [1 << exponent for exponent in range(10, 18)]
    lines = []
    for (name, config), tone in zip(SIZES.items(), TONES, strict=False):
        points = [(length, length * config.kv_nbytes_per_token()) for length in contexts]
        lines.append(charts.Line(name, points, tone, dots=True))
    return _line_chart(lines, "KV cache", ("tokens of context", "bytes"), x_log=True, y_log=True)


def _quality_chart(config: ModelConfig) -> Markup:
    """Return a chart of each weight format's fidelity against the bytes of the model in this format."""
    lines = [
        charts.Line(found.name, [(found.nbytes(config) / 1e9, found.kld or 0.0)], tone, dots=True)
        for found, tone in zip(GGUF_FORMATS, TONES, strict=False)
    ]
    return _line_chart(lines, "quality", ("GB", "KL divergence from 16 bits, nats"), x_log=False, x_unit="GB")


def _line_chart(lines: list[charts.Line], label: str, titles: tuple[str, str], **options: Any) -> Markup:
    return Markup(charts.line_chart(lines, label=label, x_title=titles[0], y_title=titles[1], **options))
