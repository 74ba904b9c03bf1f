"""`herd plan train`, `finetune`, `distil` and `machines`. The other verbs are in ``plan_*.py``.

Each training verb searches all parallel layouts that divide the model and fit in memory. It prints the
fastest, the runners-up, the reason for the difference, days and dollars. Nothing is downloaded or run, and
torch is not needed.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import units
from ..errors import PlanError
from ..plan.quantity import CONTEXT, TIME, USD, whole
from . import plan_leak, plan_local, plan_serve
from . import plan_options as opt
from .common import Json, RunFirst, picked, print_json

if TYPE_CHECKING:
    from ..llama.config import ModelConfig
    from ..plan.layout import Job, ParallelLayout
    from ..plan.machines import Machine
    from ..plan.search import SearchResult
    from ..plan.training import TrainPlan

app = typer.Typer(cls=RunFirst, add_completion=False, rich_markup_mode=None)
app.command("here")(plan_local.plan_command)
app.command("run")(plan_local.run_command)
app.command("serve")(plan_serve.serve_command)

Where = Annotated[str, typer.Option("--machine", help="A number of devices: 16384xH100, 2xRTX4090; or here.")]
Tokens = Annotated[
    opt.Number, opt.count("Tokens to train on, in all epochs: 15.6T, 94B, 1e12.", opt.MAX_TOKENS)
]
Batch = Annotated[
    opt.Number, opt.count("Tokens per step, e.g. 16M (default: a usual value).", opt.MAX_TOKENS, CONTEXT)
]
Precision = Annotated[str, typer.Option(help="Precision of the matmuls: bf16 or fp8.")]
Budget = Annotated[opt.Number, opt.number(USD, "US dollars to spend: prints how many tokens they pay for.")]
Top = Annotated[opt.Number, opt.count("How many layouts to show.", 1000)]
Html = Annotated[Path | None, typer.Option("--html", help="Also write a page with charts to this file.")]


@app.command("train")
def train_command(
    size: opt.Size = "405B",
    tokens: Tokens = "15.6T",
    layout: Annotated[
        str | None,
        typer.Option(help="Use this layout: tp=8,pp=16,dp=128,chunks=8,recompute=none,shard=gradients."),
    ] = None,
    restart: Annotated[
        opt.Number, opt.number(TIME, "Time from a failure until training continues: 600, 10min.")
    ] = "10min",
    machine: Where = "16384xH100",
    context: opt.Context = None,
    batch: Batch = None,
    precision: Precision = "bf16",
    usd_per_hour: opt.UsdPerHour = None,
    budget: Budget = None,
    machines: opt.Machines = None,
    top: Top = "5",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Plan pre-training: layout, memory, days and dollars."""
    from ..plan.training import plan_training

    target, context = _target(machine, machines), opt.usual_context(context, size)
    plan = plan_training(
        _job(size.config, target, context, batch),
        target,
        tokens,
        precision=_precision(precision),
        fixed=None if layout is None else _parse_layout(layout, precision),
        usd_per_hour=usd_per_hour,
        restart=restart,
    )
    _show(plan, f"{size.name}, pre-training", budget, top, html, as_json)


@app.command("finetune")
def finetune_command(
    size: opt.Size = "8B",
    tokens: Tokens = "100M",
    method: Annotated[str, typer.Option(help="full, lora (bf16 weights) or qlora (4-bit weights).")] = "lora",
    rank: Annotated[opt.Number, opt.count("Rank of the adapters.", 2**16)] = "16",
    machine: Where = "RTX4090",
    context: opt.Context = "2048",
    batch: Batch = None,
    precision: Precision = "bf16",
    usd_per_hour: opt.UsdPerHour = None,
    budget: Budget = None,
    machines: opt.Machines = None,
    top: Top = "5",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Plan fine-tuning of all parameters or of adapters."""
    from ..plan.training import finetune_job, plan_training

    target = _target(machine, machines)
    job = _job(size.config, target, context, batch or max(32_768, target.count * context))
    job = finetune_job(job.config, job.batch, job.context, method, rank)
    plan = plan_training(job, target, tokens, precision=_precision(precision), usd_per_hour=usd_per_hour)
    _show(plan, f"{size.name}, fine-tuning ({method})", budget, top, html, as_json)


@app.command("distil")
def distil_command(
    teacher: Annotated[Any, opt.model_option("The teacher: a size or any model.")] = "405B",
    student: Annotated[Any, opt.model_option("The student: a size or any model.")] = "8B",
    tokens: Tokens = "94B",
    machine: Where = "64xH100",
    context: opt.Context = None,
    batch: Batch = None,
    precision: Precision = "bf16",
    usd_per_hour: opt.UsdPerHour = None,
    budget: Budget = None,
    machines: opt.Machines = None,
    top: Top = "5",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Plan distillation from a teacher to a student.

    The teacher's targets are written to disk once, then the student is trained on them.
    """
    from ..plan.training import label_with_teacher, plan_training

    if teacher.config.n_params <= student.config.n_params:
        raise PlanError(
            f"the teacher {teacher.name} is no larger than its student {student.name}: exchange them"
        )
    target, context = _target(machine, machines), opt.usual_context(context, teacher, student)
    job = _job(student.config, target, context, batch)
    labelled = label_with_teacher(teacher.config, target, tokens, context)
    plan = plan_training(
        job, target, tokens, precision=_precision(precision), usd_per_hour=usd_per_hour, teacher=labelled
    )
    _show(plan, f"{teacher.name} to {student.name}, distillation", budget, top, html, as_json)


@app.callback()
def _group() -> None:
    """Predict memory, speed and cost before you start: herd plan, or herd plan MODEL."""


app.command("draft")(plan_serve.draft_command)
app.command("score")(plan_serve.score_command)
app.command("leak")(plan_leak.leak_command)


@app.command("machines")
def machines_command(
    name: Annotated[str | None, typer.Argument(help="One machine, e.g. 8xH100 (default: all).")] = None,
    machines: opt.Machines = None,
    as_json: Json = False,
) -> None:
    """List machines: memory, bandwidth, peak, links, prices. Add your own in ~/.config/herd/machines.yaml."""
    from ..plan.machines import read_catalogue

    catalogue = read_catalogue(machines)
    found = [catalogue.machine(each) for each in ([name] if name else catalogue.devices)]
    if as_json:
        print_json([_machine_record(machine) for machine in found])
        return
    rows = []
    for machine in found:
        device = machine.device
        speeds = f"{device.peak('bf16') / 1e12:,.4g}|{device.reachable('bf16') / 1e12:,.4g}"
        rent = f"{machine.rent[0].usd:.2f} ({machine.rent[0].date})" if machine.rent else "–"
        price = f"{machine.buy[0].usd:,.0f} ({machine.buy[0].date})" if machine.buy else "–"
        memory = f"{device.memory / 1e9:,.0f}|{device.bandwidth / 1e9:,.0f}"
        rows.append(f"{machine.name}|{memory}|{speeds}|{machine.link.name}|{rent}|{price}")
    header = "one device|memory GB|read GB/s|bf16 TFLOP/s|reached|link|rent USD/h|purchase USD"
    opt.print_rows(header, rows)
    if name:
        device = found[0].device
        print(f"{device.title}. Source: {device.source or 'your own file'}.")
        print(f"Source of the reached fraction of the peak: {device.efficiency.source}")


def _target(name: str, machines: Path | None) -> Machine:
    from ..plan.machines import find_machine

    return opt.measured_target().profile.machine() if name == "here" else find_machine(name, machines)


def _job(config: ModelConfig, machine: Machine, context: int, batch_tokens: int | None) -> Job:
    from ..plan.layout import Job
    from ..plan.training import default_batch

    if batch_tokens is None:
        return Job(config, default_batch(config, context, machine.count), context)
    if batch_tokens < context:
        raise PlanError(f"--batch of {batch_tokens:,} tokens is less than one sequence of {context:,}")
    return Job(config, batch_tokens // context, context)


def _precision(text: str) -> str:
    from ..dtypes import parse_dtype

    return parse_dtype(text, ("bf16", "fp8"))


def _parse_layout(text: str, precision: str) -> ParallelLayout:
    from ..plan.layout import RECOMPUTES, SHARDS, ParallelLayout

    words: dict[str, tuple[str, ...]] = {"recompute": RECOMPUTES, "shard": SHARDS}
    numbers = ("tp", "cp", "pp", "dp", "micro", "chunks")
    values: dict[str, Any] = {"precision": precision}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in words:
            if value not in words[name]:
                raise PlanError(f"--layout {name}={value!r} is not one of {', '.join(words[name])}")
            values[name] = value
        elif name in numbers:
            values[name] = whole(1e6, example="tp=8,pp=16,dp=128").parse(value, f"--layout {name}")
        else:
            known = ", ".join((*numbers, *words))
            raise PlanError(f"--layout part {part!r} is not one of {known}: write, e.g., tp=8,pp=16,dp=128")
    return ParallelLayout(**values)


# Results --------------------------------------------------------------------------------


def _machine_record(machine: Machine) -> dict[str, Any]:
    names = (
        "name count title=device.title kind=device.kind memory_bytes=device.memory "
        "bandwidth=device.bandwidth flops=device.flops link=link.name per_node network=network.name "
        "watts=device.power source=device.source"
    )
    return picked(machine, names) | {
        "reached_bf16": machine.device.reachable("bf16"),
        "rent": [asdict(price) for price in machine.rent],
        "buy": [asdict(price) for price in machine.buy],
        "approximate": list(machine.approximate),
    }


def _show(
    plan: TrainPlan, title: str, budget: float | None, top: int, html: Path | None, as_json: bool
) -> None:
    """Print the plan as tables or JSON, and write the HTML page if asked."""
    if html is not None:
        from ..files import write_atomically
        from ..plan.page import render_plan

        write_atomically(html, render_plan(plan, title))
    shown = [plan.best, *plan.others[: top - 1]]
    if as_json:
        print_json(_plan_record(plan, title, shown, budget))
        return
    _print_layouts(plan, title, shown)
    _print_costs(plan, budget)
    if html is not None:
        print(f"Page: {html}")


def _plan_record(
    plan: TrainPlan, title: str, shown: list[SearchResult], budget: float | None
) -> dict[str, Any]:
    best, *others = [
        asdict(found.layout)
        | picked(found, "mfu step_seconds=seconds tokens_per_s bytes_total=nbytes.total")
        | {"seconds": found.step.parts(), "bytes": found.nbytes.parts()}
        for found in shown
    ]
    names = (
        "n_params=job.config.n_params tokens batch_tokens=job.tokens context=job.context steps "
        "layouts_seen=seen layouts_that_fit=feasible days device_hours energy_kwh=money.energy_kwh"
    )
    usd = asdict(plan.money)
    record = picked(plan, names) | {
        "what": title,
        "machine": _machine_record(plan.machine),
        "trained_params": plan.job.adapters or plan.job.config.n_params,
        "best": best,
        "others": others,
        "days_without_failures": plan.busy_hours / 24,
        "goodput": asdict(plan.goodput),
        "usd": {name: usd[name] for name in ("rent", "own", "buy", "rent_price", "buy_price")},
    }
    if plan.teacher is not None:
        names = "n_params=config.n_params tp replicas hours cache_bytes"
        record["teacher"] = picked(plan.teacher, names)
    if budget is not None:
        record |= {"budget_usd": budget, "tokens_within_budget": _affordable_tokens(plan, budget)}
    return record


def _print_layouts(plan: TrainPlan, title: str, shown: list[SearchResult]) -> None:
    from ..plan.memory import usable_memory

    job, machine, best = plan.job, plan.machine, plan.best
    trained = "" if job.adapters is None else f" ({job.adapters:,} of them trained)"
    print(f"{title}: {job.config.n_params:,} parameters{trained} on {machine.name}")
    print(
        f"{units.si(plan.tokens)} tokens in {plan.steps:,.0f} steps of {units.si(job.tokens)} tokens "
        f"({job.batch:,} sequences of {job.context:,})\n"
    )
    if (teacher := plan.teacher) is not None:
        print(
            f"Teacher: {teacher.replicas:,} replicas of TP {teacher.tp} label all tokens in "
            f"{teacher.hours:,.1f} h; targets on disk: {units.nbytes(teacher.cache_bytes)}.\n"
        )
    room = f"GB of {usable_memory(machine.device.memory) / 1e9:.0f}"
    opt.print_rows(
        f"layout|micro|chunks|recompute|shard|{room}|step s|tokens/s|MFU %",
        (
            f"{found.layout}|{found.layout.micro}|{found.layout.chunks}|{found.layout.recompute}|"
            f"{found.layout.shard}|{found.nbytes.total / 1e9:.1f}|{found.seconds:.3g}|"
            f"{found.tokens_per_s:,.0f}|{100 * found.mfu:.1f}"
            for found in shown
        ),
    )
    print(f"{plan.feasible:,} of {plan.seen:,} layouts fit; a row is the best one of its TP × CP × PP × DP.")
    if plan.others:
        print(_difference(best, plan.others[0]))
    parts = [(name, value) for name, value in best.step.parts().items() if value > 0]
    print()
    opt.print_rows("a step|s|%", (f"{n}|{value:.3f}|{100 * value / best.seconds:.1f}" for n, value in parts))
    held = [*best.nbytes.parts().items(), ("total", best.nbytes.total)]
    print()
    opt.print_rows(
        "memory of the fullest device|GB", (f"{n}|{value / 1e9:.2f}" for n, value in held if value)
    )
    print()


def _difference(best: SearchResult, other: SearchResult) -> str:
    """Return a sentence that names the parts of a step in which the winner is faster than the runner-up."""
    mine, theirs = best.step.parts(), other.step.parts()
    gaps = sorted(((theirs[name] - mine[name], name) for name in mine), key=lambda gap: -abs(gap[0]))
    reasons = [
        f"{abs(gap):.2g} s {'less' if gap > 0 else 'more'} {name}"
        for gap, name in gaps[:3]
        if abs(gap) > 0.002 * best.seconds
    ]
    ahead = 100 * (other.seconds / best.seconds - 1)
    why = ", ".join(reasons) or "small differences"
    return f"{best.layout} is {ahead:.1f} % ahead of {other.layout}: {why}."


def _print_costs(plan: TrainPlan, budget: float | None) -> None:
    goodput, cost = plan.goodput, plan.money
    rows = [
        f"time without failures|{units.duration(3600 * plan.busy_hours)}",
        f"useful fraction of the time|{100 * goodput.effective:.1f} %",
        f"time|{units.duration(3600 * plan.hours)}",
        f"device hours|{plan.device_hours:,.0f}",
        f"energy|{units.si(cost.energy_kwh * 1000, 'Wh')}",
    ]
    if cost.rent is not None and cost.rent_price is not None:
        rows.append(f"rent at {cost.rent_price.usd:.2f} USD/h|{cost.rent:,.0f} USD")
    if cost.own is not None:
        rows.append(f"owned: price spread over 3 years, plus power|{cost.own:,.0f} USD")
        rows.append(f"price of the machine|{cost.buy:,.0f} USD")
    opt.print_rows("the run|", rows)
    print(
        f"A failure every {units.duration(goodput.between_failures)}; a checkpoint of "
        f"{goodput.checkpoint_seconds:.1f} s every {units.duration(goodput.interval)} (Young–Daly)."
    )
    for word, price in (("Rent", cost.rent_price), ("Purchase", cost.buy_price)):
        if price is not None:
            date = f", {price.date}" if price.date else ""
            print(f"{word}: {price.usd:,.2f} USD per device{date}, {price.source}.")
    if plan.machine.approximate:
        print(f"Estimated, not from a data sheet of this machine: {', '.join(plan.machine.approximate)}.")
    if budget is not None:
        tokens = _affordable_tokens(plan, budget)
        if tokens is None:
            print("No price is known for this machine: give --usd-per-hour.")
        else:
            enough = "enough" if tokens >= plan.tokens else "not enough"
            print(f"{budget:,.0f} USD rent {units.si(tokens)} tokens of training: {enough}.")


def _affordable_tokens(plan: TrainPlan, budget: float) -> float | None:
    return None if plan.money.rent is None else plan.tokens * budget / plan.money.rent
