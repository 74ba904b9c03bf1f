"""`herd plan`: what fits, how fast, what it costs. This file: training (`train`, `finetune`, `distil`) and
`machines`.

Each verb searches all layouts that divide and fit, prints the fastest beside the runners-up, says why it won,
and ends in days and dollars. Nothing is downloaded or run; no torch."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PlanError
from . import plan_leak, plan_local, plan_serve
from .common import Json, long_time, print_json, print_table

if TYPE_CHECKING:
    from ..llama.config import ModelConfig
    from ..plan.layout import Job, ParallelLayout
    from ..plan.machines import Machine
    from ..plan.search import Found
    from ..plan.training import TrainPlan

app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.callback(invoke_without_command=True)(plan_local.here)
app.command("run")(plan_local.run)
app.command("serve")(plan_serve.serve)
app.command("draft")(plan_serve.draft)
app.command("score")(plan_serve.score)
app.command("leak")(plan_leak.leak_command)

Size = Annotated[str, typer.Option(help="A published model: 405B, 70B, 8B, 3B, 1B.")]
Tokens = Annotated[str, typer.Option(help="Tokens to train on, all epochs together: 15.6T, 94B, 100M.")]
Machines = Annotated[Path | None, typer.Option("--machines", help="A file of your own machines (YAML).")]


@dataclass(frozen=True)
class Asked:
    """The options that all training verbs share, as they were typed. `PlanError` for values that cannot
    be."""

    machine: Annotated[
        str, typer.Option("--machine", help="How many of what: 16384xH100, 2xRTX4090; or here.")
    ] = "16384xH100"
    context: Annotated[str, typer.Option(help="Tokens of a sequence: 8192, 32k, 128k.")] = "8192"
    batch: Annotated[str | None, typer.Option(help="Tokens of a step, e.g. 16M, if not the usual ones.")] = (
        None
    )
    precision: Annotated[str, typer.Option(help="What the matmuls run in: bf16 or fp8.")] = "bf16"
    usd_per_hour: Annotated[
        float | None, typer.Option(help="Rent of one device, if not the catalogue's.")
    ] = None
    budget: Annotated[float | None, typer.Option(help="US dollars there are: says what they buy.")] = None
    machines: Machines = None
    top: Annotated[int, typer.Option(help="How many layouts to show.")] = 5
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with charts here.")] = None
    as_json: Json = False

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp8"):
            raise PlanError(f"precision {self.precision!r} is not one of bf16, fp8")
        if self.budget is not None and not 0 < self.budget < float("inf"):
            raise PlanError(f"budget={self.budget:g} USD must be positive")
        if self.top < 1:
            raise PlanError(f"top={self.top}: show at least 1 layout")

    @functools.cached_property
    def target(self) -> Machine:
        if self.machine == "here":
            return plan_local.measured_once().profile.machine()
        from ..plan import machines

        return machines.find_machine(self.machine, self.machines)

    def job(self, config: ModelConfig, usual_batch: Callable[[int], int] | None = None) -> Job:
        """``usual_batch``: tokens of a step by context, where they are not those of Llama 3.1's
        pre-training."""
        from ..plan import quantity, training

        length = quantity.context(self.context)
        if self.batch is not None:
            tokens = quantity.context(
                self.batch, "batch"
            )  # 16M of a batch is 16 · 2^20: batches are powers of two
            if tokens < length:
                raise PlanError(
                    f"batch={tokens:,} tokens is less than one sequence of {length:,}: give at least that"
                )
            return training.Job(config, tokens // length, length)
        if usual_batch is not None:
            return training.Job(config, usual_batch(length) // length, length)
        return training.Job(config, training.default_batch(config, length, self.target.count), length)

    def plan(self, job: Job, tokens: str, **more: Any) -> TrainPlan:
        from ..plan import quantity, training

        return training.plan(
            job,
            self.target,
            quantity.tokens(tokens),
            precision=self.precision,
            usd_per_hour=self.usd_per_hour,
            **more,
        )


def training_verb(**defaults: str) -> Callable[[Callable[..., tuple[Any, str]]], None]:
    """Registers a verb: a function from `Asked` and its own options to a plan and its title. The options of
    `Asked`, with other ``defaults`` if need be, are added to its own; printing follows."""

    def register(planned: Callable[..., tuple[Any, str]]) -> None:
        hints = typing.get_type_hints(Asked, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=hints[field.name],
            )
            for field in fields(Asked)
        ]
        _, *own = inspect.signature(planned, eval_str=True).parameters.values()

        def verb(**given: Any) -> None:
            asked = Asked(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            _show(*planned(asked, **given), asked)

        verb.__doc__ = planned.__doc__
        verb.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        app.command(planned.__name__)(verb)

    return register


@training_verb()
def train(
    asked: Asked,
    size: Size = "405B",
    tokens: Tokens = "15.6T",
    layout: Annotated[
        str | None,
        typer.Option(help="Only this one: tp=8,pp=16,dp=128,chunks=8,recompute=none,shard=gradients."),
    ] = None,
    restart: Annotated[float | None, typer.Option(help="Seconds from a failure to training again.")] = None,
) -> tuple[Any, str]:
    """Pre-training: layout, memory, MFU, days, dollars, what failures leave."""
    from ..plan import training

    job = asked.job(training.size(size))
    fixed = _layout(layout, asked.precision)
    return asked.plan(job, tokens, fixed=fixed, restart=restart), f"{size.upper()}, pre-training"


@training_verb(machine="RTX4090", context="2048")
def finetune(
    asked: Asked,
    size: Size = "8B",
    tokens: Tokens = "100M",
    method: Annotated[str, typer.Option(help="full, lora (bf16 weights) or qlora (4-bit weights).")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
) -> tuple[Any, str]:
    """Fine-tuning: every parameter, or adapters beside a frozen model."""
    from ..plan import training

    config = training.size(size)
    job = asked.job(config, lambda length: max(32_768, asked.target.count * length))
    job = training.finetune_job(config, job.batch, job.context, method, rank)
    return asked.plan(job, tokens), f"{size.upper()}, fine-tuning ({method})"


@training_verb(machine="64xH100")
def distil(
    asked: Asked,
    teacher: Annotated[str, typer.Option(help="The teacher's size.")] = "405B",
    student: Annotated[str, typer.Option(help="The student's size.")] = "8B",
    tokens: Tokens = "94B",
) -> tuple[Any, str]:
    """Distillation: a teacher's targets written to disk once, then the student's training."""
    from ..plan import quantity, training

    small, large = training.size(student), training.size(teacher)
    if large.n_params <= small.n_params:
        raise PlanError(f"a teacher of {teacher} is no larger than its student of {student}: exchange them")
    job = asked.job(small)
    labelled = training.label(large, asked.target, quantity.tokens(tokens), job.context)
    title = f"{teacher.upper()} to {student.upper()}, distillation"
    return asked.plan(job, tokens, teacher=labelled), title


@app.command("machines")
def machines_command(
    name: Annotated[str | None, typer.Argument(help="One of them, e.g. 8xH100; without, all.")] = None,
    machines: Machines = None,
    as_json: Json = False,
) -> None:
    """The machines there are: memory, bandwidth, peak, links, prices. Add your own in
    ~/.config/herd/machines.yaml."""
    from ..plan import machines as known

    catalogue = known.catalogue(machines)
    found = (
        [catalogue.machine(name)] if name else [catalogue.machine(each) for each in catalogue.device_names()]
    )
    if as_json:
        print_json([_machine_record(machine) for machine in found])
        return
    rows = [
        [
            machine.name,
            f"{machine.device.memory / 1e9:,.0f}",
            f"{machine.device.bandwidth / 1e9:,.0f}",
            f"{machine.device.peak('bf16') / 1e12:,.4g}",
            f"{machine.device.reachable('bf16') / 1e12:,.4g}",
            machine.link.name,
            f"{machine.rent[0].usd:.2f} ({machine.rent[0].date})" if machine.rent else "–",
            f"{machine.buy[0].usd:,.0f} ({machine.buy[0].date})" if machine.buy else "–",
        ]
        for machine in found
    ]
    print_table(
        [
            "a device of",
            "memory GB",
            "read GB/s",
            "bf16 TFLOP/s",
            "reached",
            "link",
            "rent USD/h",
            "bought USD",
        ],
        rows,
    )
    if name:
        device = found[0].device
        print(f"{device.title}. Source: {device.source or 'measured or your own'}.")
        print(f"Reached shares: {device.efficiency.source}")


def _machine_record(machine: Any) -> dict[str, Any]:
    device = machine.device
    return {
        "name": machine.name,
        "count": machine.count,
        "title": device.title,
        "kind": device.kind,
        "memory_bytes": device.memory,
        "bandwidth": device.bandwidth,
        "flops": dict(device.flops),
        "reached_bf16": device.reachable("bf16"),
        "link": machine.link.name,
        "per_node": machine.per_node,
        "network": machine.network.name,
        "watts": device.power,
        "rent": [price.__dict__ for price in machine.rent],
        "buy": [price.__dict__ for price in machine.buy],
        "approximate": list(machine.approximate),
        "source": device.source,
    }


def _layout(text: str | None, precision: str) -> ParallelLayout | None:
    from ..plan.layout import RECOMPUTES, SHARDS, ParallelLayout

    if text is None:
        return None
    known = {
        "tp": int,
        "cp": int,
        "pp": int,
        "dp": int,
        "micro": int,
        "chunks": int,
        "recompute": str,
        "shard": str,
    }
    values: dict[str, Any] = {"precision": precision}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in known or not value:
            raise PlanError(
                f"layout part {part!r} is not one of {', '.join(known)}: write it like tp=8,pp=16,dp=128"
            )
        try:
            values[name] = known[name](value)
        except ValueError:
            raise PlanError(f"layout part {part!r} needs a whole number") from None
    for name, allowed in (("recompute", RECOMPUTES), ("shard", SHARDS)):
        if name in values and values[name] not in allowed:
            raise PlanError(f"{name}={values[name]!r} is not one of {', '.join(allowed)}")
    return ParallelLayout(**values)


def _show(plan: TrainPlan, title: str, asked: Asked) -> None:
    """The plan as it was asked for: a table or JSON, and a page."""
    if asked.html is not None:
        from ..files import write_atomically
        from ..plan.page import render

        write_atomically(asked.html, render(plan, title))
    if asked.as_json:
        print_json(_record(plan, title, asked.top, asked.budget))
        return
    _print(plan, title, asked.top, asked.budget)
    if asked.html is not None:
        print(f"Page: {asked.html}")


def _record(plan: TrainPlan, title: str, top: int, budget: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "what": title,
        "machine": _machine_record(plan.machine),
        "n_params": plan.job.config.n_params,
        "trained_params": plan.job.adapters or plan.job.config.n_params,
        "tokens": plan.tokens,
        "batch_tokens": plan.job.tokens,
        "context": plan.job.context,
        "steps": plan.steps,
        "layouts_seen": plan.seen,
        "layouts_that_fit": plan.feasible,
        "best": _layout_record(plan.best),
        "others": [_layout_record(found) for found in plan.others[: top - 1]],
        "days_without_failures": plan.busy_hours / 24,
        "days": plan.days,
        "device_hours": plan.device_hours,
        "goodput": plan.goodput.__dict__,
        "usd": {
            "rent": plan.money.rent,
            "own": plan.money.own,
            "buy": plan.money.buy,
            "rent_price": plan.money.rent_price and plan.money.rent_price.__dict__,
            "buy_price": plan.money.buy_price and plan.money.buy_price.__dict__,
        },
        "energy_kwh": plan.money.energy_kwh,
    }
    if (teacher := plan.teacher) is not None:
        record["teacher"] = {
            "n_params": teacher.config.n_params, "tp": teacher.tp, "replicas": teacher.replicas,
            "hours": teacher.hours, "cache_bytes": teacher.cache_bytes,
        }  # fmt: skip
    if budget is not None:
        record["budget_usd"] = budget
        record["tokens_within_budget"] = _affordable(plan, budget)
    return record


def _layout_record(found: Found) -> dict[str, Any]:
    layout = found.layout
    return {
        **{name: getattr(layout, name) for name in layout.__dataclass_fields__},
        "mfu": found.mfu,
        "step_seconds": found.seconds,
        "tokens_per_s": found.tokens_per_s,
        "seconds": found.step.parts(),
        "bytes": found.nbytes.parts(),
        "bytes_total": found.nbytes.total,
    }


def _print(plan: TrainPlan, title: str, top: int, budget: float | None) -> None:
    from ..plan.memory import usable
    from ..report import units

    job, machine, best = plan.job, plan.machine, plan.best
    trained = "" if job.adapters is None else f" ({job.adapters:,} of them learn)"
    print(f"{title}: {job.config.n_params:,} parameters{trained} on {machine.name}")
    print(
        f"{units.si(plan.tokens)} tokens in {plan.steps:,.0f} steps of {units.si(job.tokens)} tokens "
        f"({job.batch:,} sequences of {job.context:,})\n"
    )
    if (teacher := plan.teacher) is not None:
        print(
            f"Teacher: {teacher.replicas:,} replicas of TP {teacher.tp} label all tokens in {teacher.hours:,.1f} h; "
            f"targets on disk {units.nbytes(teacher.cache_bytes)}.\n"
        )
    room = usable(machine.device.memory)
    print_table(
        ["layout", "micro", "pieces", "recompute", "shard", f"GB of {room / 1e9:.0f}", "step s", "tokens/s", "MFU %"],
        [
            [
                str(found.layout), str(found.layout.micro), str(found.layout.chunks), found.layout.recompute,
                found.layout.shard, f"{found.nbytes.total / 1e9:.1f}", f"{found.seconds:.3g}",
                f"{found.tokens_per_s:,.0f}", f"{100 * found.mfu:.1f}",
            ]
            for found in (best, *plan.others[: top - 1])
        ],
    )  # fmt: skip
    print(f"{plan.feasible:,} of {plan.seen:,} layouts fit; the best of each TP × CP × PP × DP is shown.")
    if plan.others:
        print(why(best, plan.others[0]))
    print()
    seconds, nbytes = best.step.parts(), best.nbytes.parts()
    print_table(
        ["a step", "s", "%"],
        [[n, f"{v:.3f}", f"{100 * v / best.seconds:.1f}"] for n, v in seconds.items() if v > 0],
    )
    print()
    print_table(
        ["memory of the fullest device", "GB"],
        [[name, f"{value / 1e9:.2f}"] for name, value in nbytes.items() if value]
        + [["in all", f"{best.nbytes.total / 1e9:.2f}"]],
    )
    print()
    _print_costs(plan, budget)


def _print_costs(plan: TrainPlan, budget: float | None) -> None:
    from ..report import units

    good, cost = plan.goodput, plan.money
    rows = [
        ["time, nothing failing", long_time(plan.busy_hours)],
        ["share of time that counts", f"{100 * good.effective:.1f} %"],
        ["time", long_time(plan.hours)],
        ["device hours", f"{plan.device_hours:,.0f}"],
        ["energy", f"{units.si(cost.energy_kwh * 1000, 'Wh')}"],
    ]
    if cost.rent is not None and cost.rent_price is not None:
        rows.append([f"rent at {cost.rent_price.usd:.2f} USD/h", f"{cost.rent:,.0f} USD"])
    if cost.own is not None:
        rows.append(["own: purchase over 3 years, power", f"{cost.own:,.0f} USD"])
        rows.append(["bought outright", f"{cost.buy:,.0f} USD"])
    print_table(["the run", ""], rows)
    print(
        f"A failure every {long_time(good.between_failures / 3600)}, a checkpoint of {good.checkpoint_seconds:.1f} s "
        f"every {units.duration(good.interval)} (Young–Daly)."
    )
    for word, price in (("Rent", cost.rent_price), ("Purchase", cost.buy_price)):
        if price is not None:
            print(
                f"{word}: {price.usd:,.2f} USD a device{f', {price.date}' if price.date else ''}, {price.source}."
            )
    if plan.machine.approximate:
        print(f"Not of a data sheet for this machine: {', '.join(plan.machine.approximate)}.")
    if budget is not None:
        within = _affordable(plan, budget)
        if within is None:
            print("No price is known for this machine: give --usd-per-hour.")
        else:
            enough = "enough" if within >= plan.tokens else "not enough"
            print(f"{budget:,.0f} USD rent {units.si(within)} tokens of training: {enough}.")


def _affordable(plan: TrainPlan, budget: float) -> float | None:
    """Tokens a budget trains on, rented."""
    return None if plan.money.rent is None else plan.tokens * budget / plan.money.rent


def why(best: Found, other: Found) -> str:
    """What decided between the winner and the next shape: the parts of a step that differ most."""
    mine, theirs = best.step.parts(), other.step.parts()
    gaps = sorted(((theirs[name] - mine[name], name) for name in mine), key=lambda gap: -abs(gap[0]))
    told = [
        f"{abs(gap):.2g} s {'less' if gap > 0 else 'more'} {name}"
        for gap, name in gaps[:3]
        if abs(gap) > 0.002 * best.seconds
    ]
    ahead = 100 * (other.seconds / best.seconds - 1)
    return f"{best.layout} is {ahead:.1f} % ahead of {other.layout}: {', '.join(told) or 'in nothing that stands out'}."
