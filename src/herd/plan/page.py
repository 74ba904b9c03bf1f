"""A training plan as one HTML page without scripts: the step and the memory divided, the runners-up, one
machine to many, memory by context, quality against bytes.

It looks as the other pages do (`herd.report.template`); every number is computed when the page is written,
except the fidelity of formats, which was measured and is named with its source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from markupsafe import Markup

from ..errors import PlanError
from ..llama.config import SIZES, ModelConfig
from ..report import charts, units
from ..report.template import template
from .layout import Job
from .memory import usable
from .search import search
from .training import TrainPlan, default_batch
from .ways import BEHIND_KLD, GGUF_FORMS

TONES = ("teacher", "long", "instruct", "student", "other", "control", "none", "accent", "good", "bad")
SHOWN = 8
"""Layouts in the table of runners-up."""


class Card(NamedTuple):
    """One number at the top of the page."""

    title: str
    value: str
    unit: str
    caption: str
    tone: str


class Divided(NamedTuple):
    """A whole in its parts: the bar, and (part, tone, amount, share) rows."""

    bar: Markup
    rows: list[tuple[str, str, str, str]]


def render(plan: TrainPlan, title: str) -> str:
    """The whole page."""
    days, cost = scaling_charts(plan)
    best, job = plan.best, plan.job
    return template("herd.plan", "plan.html.jinja").render(
        title=f"{title} on {plan.machine.name}",
        lead=f"{job.config.n_params:,} parameters, {units.si(plan.tokens)} tokens in {plan.steps:,.0f} steps of "
        f"{units.si(job.tokens)} ({job.batch:,} sequences of {job.context:,}).",
        facts=[str(best.layout), f"micro-batch {best.layout.micro}", f"{best.layout.chunks} pieces a stage",
               f"recomputation {best.layout.recompute}", f"sharded: {best.layout.shard}", best.layout.precision],
        cards=cards(plan),
        step=divided("A step", best.step.parts(), lambda value: f"{value:.3g} s"),
        memory=divided("Memory", best.nbytes.parts(), units.nbytes),
        layouts=[best, *plan.others[: SHOWN - 1]],
        feasible=plan.feasible,
        seen=plan.seen,
        room=units.nbytes(usable(plan.machine.device.memory)),
        days=days,
        cost=cost,
        context=context_chart(),
        quality=quality_chart(job.config),
        quality_source=BEHIND_KLD,
        prices=[price for price in (plan.money.rent_price, plan.money.buy_price) if price is not None],
        approximate=plan.machine.approximate,
    )  # fmt: skip


def cards(plan: TrainPlan) -> list[Card]:
    """Time, MFU, goodput, memory, dollars."""
    good, money = plan.goodput, plan.money
    share = (
        f"{100 * good.effective:.1f} % of it counts; a failure every {units.duration(good.between_failures)}"
    )
    found = [
        Card("Time", f"{plan.days:,.1f}", "days", share, "teacher"),
        Card(
            "MFU", f"{100 * plan.best.mfu:.1f}", "%", f"{plan.best.tokens_per_s:,.0f} tokens a second", "long"
        ),
        Card(
            "Device hours",
            units.si(plan.device_hours),
            "",
            f"{units.si(1000 * money.energy_kwh, 'Wh')}",
            "control",
        ),
        Card(
            "Fullest device",
            f"{plan.best.nbytes.total / 1e9:.1f}",
            "GB",
            f"of {units.nbytes(usable(plan.machine.device.memory))} that tensors can have",
            "instruct",
        ),
    ]
    if money.rent is not None and money.rent_price is not None:
        caption = f"at {money.rent_price.usd:.2f} USD an hour and device"
        found.append(Card("Rented", units.si(money.rent), "USD", caption, "student"))
    if money.buy is not None and money.own is not None:
        caption = f"bought outright; {units.si(money.own)} USD of it worn off in this run, power included"
        found.append(Card("Bought", units.si(money.buy), "USD", caption, "other"))
    return found


def divided(label: str, parts: dict[str, float], show: Callable[[float], str]) -> Divided:
    """Parts that are not nothing, largest first."""
    ordered = sorted(((value, name) for name, value in parts.items() if value > 0), reverse=True)
    whole = sum(value for value, _ in ordered)
    shown = [(name, value, TONES[i % len(TONES)]) for i, (value, name) in enumerate(ordered)]
    bar = charts.divided_bar([("", shown)], label=label, show=show)
    return Divided(Markup(bar), [(name, tone, show(v), f"{100 * v / whole:.1f}") for name, v, tone in shown])


def scale(plan: TrainPlan) -> list[tuple[int, float, float]]:
    """(devices, days, USD a million tokens rented or 0) for 1, 2, 4 … devices as far as the plan's own, and
    16 times beyond a small one; those that the model fits on."""
    job, found = plan.job, []
    rent = plan.money.rent_price.usd if plan.money.rent_price else 0.0
    most = max(plan.machine.count, 1024)
    for count in (1 << exponent for exponent in range(most.bit_length())):
        machine = plan.machine.of(count)
        batch = default_batch(job.config, job.context, count)
        try:
            best = search(
                Job(job.config, max(batch, count), job.context, job.adapters, job.frozen_bytes),
                machine,
                precision=plan.best.layout.precision,
            ).found[:1]
        except PlanError:
            continue
        for fastest in best:
            days = plan.tokens / fastest.tokens_per_s / 86_400
            found.append((count, days, rent * count * 1e6 / fastest.tokens_per_s / 3600))
    return found


def scaling_charts(plan: TrainPlan) -> tuple[Markup, Markup]:
    """Days by number of devices, and dollars by speed; empty where there is nothing to draw."""
    points = scale(plan)
    if len(points) < 2:
        return Markup(""), Markup("")
    days = charts.line_chart(
        [charts.Line("days", [(count, time) for count, time, _ in points], "teacher", dots=True)],
        label="days by devices", x_title="devices", y_title="days", x_log=True, y_log=True, x_unit="devices",
    )  # fmt: skip
    rented = [(plan.tokens / time / 86_400, usd) for _, time, usd in points if usd]
    cost = charts.line_chart(
        [charts.Line("USD", rented, "student", dots=True)],
        label="cost against speed", x_title="tokens a second", y_title="USD a million tokens, rented", x_log=True,
        x_unit="tokens/s",
    )  # fmt: skip
    return Markup(days), Markup(cost)


def context_chart() -> Markup:
    """KV cache bytes by context, for each published size."""
    contexts = [1 << exponent for exponent in range(10, 18)]
    lines = [
        charts.Line(
            name, [(length, length * config.kv_nbytes_per_token()) for length in contexts], tone, dots=True
        )
        for (name, config), tone in zip(SIZES.items(), TONES, strict=False)
    ]
    drawn = charts.line_chart(
        lines, label="KV cache", x_title="tokens of context", y_title="bytes", x_log=True, y_log=True
    )
    return Markup(drawn)


def quality_chart(config: ModelConfig) -> Markup:
    """Fidelity of the formats Herd runs against the bytes they make of a model."""
    known = [form for form in GGUF_FORMS if form.kld is not None]
    lines = [
        charts.Line(form.name, [(form.nbytes(config) / 1e9, form.kld or 0.0)], tone, dots=True)
        for form, tone in zip(known, TONES, strict=False)
    ]
    drawn = charts.line_chart(
        lines, label="quality", x_title="GB", y_title="nats from 16 bits", x_log=False, x_unit="GB"
    )
    return Markup(drawn)
