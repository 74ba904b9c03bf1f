"""A training plan as one HTML page without scripts: the step and the memory divided, one machine to many, memory by
context, quality against bytes.

Charts are those of `herd.report.charts`; every number in them is computed when the page is written, except the fidelity
of formats, which was measured and is named with its source.
"""

from __future__ import annotations

import math
from html import escape

from ..errors import PlanError
from ..llama.config import SIZES, ModelConfig
from ..report import charts, palette, units
from .layout import Job
from .search import search
from .training import TrainPlan, default_batch
from .ways import BEHIND_KLD, GGUF_FORMS

_CSS = """
body { background: var(--paper); color: var(--ink); font: 16px/1.5 ui-sans-serif, system-ui, sans-serif;
  max-width: 58rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.25rem;
  margin: 1rem 0; } svg { max-width: 100%; height: auto; }
p.note { color: var(--soft); font-size: .9rem; margin: .6rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td { padding: .15rem 1.2rem .15rem 0; }
td:last-child { text-align: right; }
"""
_TONES = ("teacher", "long", "instruct", "student", "other", "control", "none", "accent", "good", "bad")


def render(plan: TrainPlan, title: str) -> str:
    """The whole page."""
    light, dark = palette.variables(palette.LIGHT), palette.variables(palette.DARK)
    style = f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_CSS}{palette.CHART_CSS}"
    best = plan.best
    parts = [
        _section("The run", _facts(plan)),
        _section(
            "A step, in seconds",
            _divided("step", str(best.layout), best.step.parts(), lambda value: f"{value:.3g} s"),
            "The bubble is a pipeline filling and emptying; tp, cp, pp and dp are what collectives add.",
        ),
        _section(
            "Memory of the fullest device",
            _divided("memory", str(best.layout), best.nbytes.parts(), units.nbytes),
        ),
        *_scaling(plan),
        _section(
            "KV cache by context",
            context_chart(),
            "bf16, one sequence, on logarithmic axes: bytes in powers of ten.",
        ),
        _section(
            "What fewer bytes cost in quality",
            quality_chart(plan.job.config),
            f"The formats Herd runs: bf16, q8, q4k, q4. {BEHIND_KLD}; larger models lose less.",
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)} on {escape(plan.machine.name)}</h1>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{body}{said}</section>" if body else ""


def _facts(plan: TrainPlan) -> str:
    rows = [
        ("Tokens", units.si(plan.tokens)),
        ("Layout", str(plan.best.layout)),
        ("MFU", f"{100 * plan.best.mfu:.1f} %"),
        ("Time", f"{plan.days:,.1f} days, {100 * plan.goodput.effective:.1f} % of it counts"),
        ("Device hours", f"{plan.device_hours:,.0f}"),
    ]
    if plan.money.rent is not None:
        rows.append(("Rent", f"{plan.money.rent:,.0f} USD"))
    if plan.money.buy is not None:
        rows.append(("Bought", f"{plan.money.buy:,.0f} USD"))
    return f"<table>{''.join(f'<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>' for a, b in rows)}</table>"


def _divided(label: str, name: str, parts: dict[str, float], show: object) -> str:
    shown = [(part, value, _TONES[i % len(_TONES)]) for i, (part, value) in enumerate(parts.items()) if value > 0]
    return charts.divided_bar([(name, shown)], label=label, show=show)  # type: ignore[arg-type]


def scale(plan: TrainPlan) -> list[tuple[int, float, float]]:
    """(devices, days, USD a million tokens rented or 0) for 1, 2, 4 … devices as far as the plan's own, and 16 times
    beyond a small one; those that the model fits on."""
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


def _scaling(plan: TrainPlan) -> list[str]:
    points = scale(plan)
    if len(points) < 2:
        return []
    days = charts.line_chart(
        [charts.Line("days", [(count, math.log10(time)) for count, time, _ in points], "teacher", dots=True)],
        label="days by devices", x_title="devices", y_title="days, powers of ten", x_log=True,
    )  # fmt: skip
    parts = [_section("One machine to many: days", days, "The fastest layout at each number of devices.")]
    if any(usd for _, _, usd in points):
        cost = charts.line_chart(
            [charts.Line("USD", [(plan.tokens / days / 86_400, usd) for _, days, usd in points], "student", dots=True)],
            label="cost against speed", x_title="tokens a second", y_title="USD a million tokens, rented", x_log=True,
        )  # fmt: skip
        parts.append(
            _section("Cost against speed", cost, "More devices train faster, at a worse price for each token.")
        )
    return parts


def context_chart() -> str:
    """KV cache bytes by context, for each published size."""
    contexts = [1 << exponent for exponent in range(10, 18)]
    lines = [
        charts.Line(
            name, [(length, math.log10(length * config.kv_nbytes_per_token())) for length in contexts], tone, dots=True
        )
        for (name, config), tone in zip(SIZES.items(), _TONES, strict=False)
    ]
    return charts.line_chart(
        lines, label="KV cache", x_title="tokens of context", y_title="bytes, powers of ten", x_log=True
    )


def quality_chart(config: ModelConfig) -> str:
    """Fidelity of the formats Herd runs against the bytes they make of a model."""
    points = sorted((form.nbytes(config), form.kld) for form in GGUF_FORMS if form.kld is not None)
    line = charts.Line("KL from 16 bits", points, "instruct", dots=True)
    return charts.line_chart([line], label="quality", x_title="bytes", y_title="nats", x_log=True)
