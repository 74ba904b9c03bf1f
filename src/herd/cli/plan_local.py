"""`herd plan`: this machine, and what runs on it; `herd plan run`: one size on any machine, with its
dollars."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PlanError
from .common import Json, print_json, print_table

if TYPE_CHECKING:
    from ..llama.config import ModelConfig
    from ..plan.machines import Machine
    from ..plan.prices import OwnCost
    from ..plan.profile import Profile
    from ..plan.ways import Here, Target, There, Way

SIZES_HERE = ("8B", "70B", "405B")
ALPHA = 0.7
"""Share of a draft's tokens that its target accepts, where none is measured: siblings of a family reach 0.6
to 0.8."""

Size = Annotated[str, typer.Option(help="A published model: 405B, 70B, 8B, 3B, 1B.")]
Where = Annotated[
    str, typer.Option("--machine", help="here (measured), or how many of what: 2xRTX4090, M2Ultra-192GB.")
]
Machines = Annotated[Path | None, typer.Option("--machines", help="A file of your own machines (YAML).")]
Again = Annotated[bool, typer.Option("--measure", help="Measure this machine anew, half a minute.")]


def here(
    context: typer.Context,
    measure: Again = False,
    feel: Annotated[bool, typer.Option("--feel", help="Stream sample text at the predicted speed.")] = False,
    size: Annotated[str | None, typer.Option(help="Only this size; with --feel, the one to feel.")] = None,
    as_json: Json = False,
) -> None:
    """What fits, how fast, what it costs. Alone: measures this machine, once, and prints the best ways to run
    each size here. Predictions learn from what `herd bench` and `herd raise` measure on it."""
    if context.invoked_subcommand is not None:
        return
    from ..plan.ways import best, ways

    sizes = (size_name(size),) if size else SIZES_HERE
    target = measured_once(measure)
    tables = {name: ways(target, name) for name in sizes}
    if feel:
        _feel(target, tables, size)
        return
    if as_json:
        print_json(
            {
                "profile": _profile_record(target.profile),
                "free_bytes": int(target.free),
                "learned": dict(target.factors),
                "sizes": {
                    name: [way_record(found) for row in rows for found in row]
                    for name, rows in tables.items()
                },
                "best": {
                    name: found and way_record(found)
                    for name, rows in tables.items()
                    for found in [best(rows)]
                },
            }
        )
        return
    _print_machine(target)
    for name, rows in tables.items():
        print()
        _print_ways(target, name, rows)
        chosen = best(rows)
        if chosen is not None:
            print(f"To run it:  {_command(name, chosen)}")
            print(_draft_line(target, chosen))
    print(
        "\nLoss: mean KL divergence from 16 bits in nats, published for Llama 3 8B (llama.cpp); larger ones lose less."
    )
    if target.factors:
        learned = ", ".join(f"{kind} × {factor:.2f}" for kind, factor in target.factors.items())
        print(f"Learned from this machine's own runs: {learned} (herd plan score).")


def run(
    size: Size = "8B",
    machine: Where = "here",
    context: Annotated[str, typer.Option(help="Tokens of a sequence: 8192, 32k, 128k.")] = "8192",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    price: Annotated[
        float | None, typer.Option(help="USD the machine costs, if not the catalogue's.")
    ] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(help="USD an hour it rents for, if not the catalogue's.")
    ] = None,
    watts: Annotated[
        float | None, typer.Option(help="Watts it draws at work, if not the catalogue's.")
    ] = None,
    machines: Machines = None,
    as_json: Json = False,
) -> None:
    """Running one size on one machine: bytes, wait, tokens/s, dollars a million tokens against APIs."""
    from ..plan import quantity
    from ..plan.ways import best, model_config, smallest_change, ways

    if batch < 1:
        raise PlanError(f"batch={batch} must be at least 1")
    size = size_name(size)
    length = quantity.context(context)
    target, known = target_of(machine, machines, model_config(size))
    rows = ways(target, size, (length,), batch)
    chosen = best(rows)
    costs = None if chosen is None else _own_costs(target, known, chosen, price, usd_per_hour, watts)
    if as_json:
        record = {
            "machine": target.name,
            "tp": getattr(target, "tp", 1),
            "ways": [way_record(row[0]) for row in rows],
            "best": chosen and way_record(chosen),
            "no": None if chosen else smallest_change(target, size, length, batch),
            "usd_per_million": None
            if costs is None
            else {k: dataclasses.asdict(v) | {"blended": v.blended} for k, v in costs.items()},
            "break_even": [] if costs is None else _break_even_records(size, costs["full"]),
        }
        print_json(finite(record))
        return
    _print_ways(target, size, rows)
    if chosen is None:
        return
    if known is None:
        print(f"To run it:  {_command(size, chosen)}")
    print(_draft_line(target, chosen))
    if costs is not None:
        print()
        _print_money(size, costs)
    elif known is None:
        print("Dollars: say what the machine costs (--price, --watts) or rents for (--usd-per-hour).")


# Targets
# -------------------------------------------------------------------------------------------------------------


def size_name(text: str) -> str:
    from ..llama.config import SIZES
    from ..plan.ways import model_config

    config = model_config(text)
    return next(name for name, known in SIZES.items() if known is config)


def measured_once(again: bool = False) -> Here:
    """This machine, from its saved profile or measured now."""
    from ..machine import available_memory as free_bytes
    from ..plan import profile as profiles
    from ..plan import score as scores
    from ..plan.ways import Here

    found = None if again else profiles.load()
    if found is None:
        found = _measured()
        profiles.save(found)
    return Here(found, free_bytes(), scores.factors(found.key))


def _measured() -> Profile:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    console.print("measuring this machine once, about half a minute; kept for next time")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading torch", total=None)
        from ..plan import measure

        return measure.measure(lambda what: bar.update(task, description=what))


def target_of(name: str, path: Path | None, config: ModelConfig) -> tuple[Here | There, Machine | None]:
    from ..plan import machines, ways

    if name == "here":
        return measured_once(), None
    machine = machines.find_machine(name, path)
    return ways.there(machine, config), machine


# Printing
# ------------------------------------------------------------------------------------------------------------


def _print_machine(target: Here) -> None:
    from ..report.units import nbytes

    p = target.profile
    isa = ", ".join(
        name for name in p.isa if name in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "i8mm")
    )
    print(
        f"This machine: {p.cpu}, {p.cores} cores ({isa}), {nbytes(p.memory)} of memory, {nbytes(target.free)} free"
    )
    rates = ", ".join(f"{name} {max(r.values()) / 1e9:,.0f}" for name, r in p.gemm.items())
    threads = ", ".join(f"{rate / 1e9:.1f} with {n}" for n, rate in p.bandwidth.items())
    print(f"Reads memory at GB/s: {threads} threads. Matmul GOP/s: {rates}.")
    disk = f"{p.disk / 1e9:.1f} GB/s from disk" if p.disk else "disk not measured"
    gpus = "; ".join(
        f"{gpu.name}, {nbytes(gpu.memory)}, {gpu.bandwidth / 1e9:,.0f} GB/s, bf16 {gpu.bf16 / 1e12:,.0f} TFLOP/s"
        for gpu in p.gpus
    )
    print(
        f"{disk[0].upper()}{disk[1:]}. GPUs: {gpus or 'none'}. Measured {p.date[:10]} in {p.seconds:.0f} s."
    )


def _print_ways(target: Target, size: str, rows: list[list[Way]]) -> None:
    from ..plan.ways import best, smallest_change

    chosen = best(rows)
    batch = rows[0][0].batch
    title = f"{size} on {target.name}" + (f", {batch} at once" if batch > 1 else "")
    if chosen is None:
        context = rows[0][0].context
        print(
            f"{title}: no, not even {context:,} tokens. {sentence(smallest_change(target, size, context, batch))}"
        )
        return
    print(f"{title}")
    contexts = [found.context for found in rows[0]]
    header = ["weights", "KV", "GB"]
    for length in contexts:
        header += [f"{_tokens(length)}: wait", "tokens/s"]
    header += ["loss"]
    table = []
    for row in rows:
        if not row[0].fits:
            continue
        mark = "*" if row[0].form is chosen.form and row[0].kv == chosen.kv else ""
        cells = [f"{row[0].form.name}{mark}", row[0].kv, f"{row[0].resident / 1e9:.1f}"]
        for found in row:
            cells += ["–", "–"] if found.step is None or found.ttft is None else [
                brief(found.ttft), f"{batch / found.step:,.3g}"]  # fmt: skip
        table.append([*cells, "?" if row[0].form.kld is None else f"{row[0].form.kld:.3f}"])
    print_table(header, table)
    for length in contexts:
        if not any(found.fits for row in rows for found in row if found.context == length):
            print(f"{_tokens(length)}: no. {sentence(smallest_change(target, size, length, batch))}")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _command(size: str, found: Way) -> str:
    """What to type to run it, given the instruct weights in a folder of their usual name."""
    folder = f"Llama-{'3.2' if size in ('1B', '3B') else '3.1'}-{size}-Instruct"
    if found.form.name == "bf16":
        return f"herd chat {folder} --dtype bfloat16"
    return f"herd quantize {folder} --to {found.form.name} && herd chat {folder}-{found.form.name}"


def _draft_line(target: Target, chosen: Way) -> str:
    """Whether a smaller model of the family, drafting, would pay."""
    from ..llama.config import SIZES
    from ..plan.serve import best_draft, verify_cost
    from ..plan.ways import model_config, way

    config, best = model_config(chosen.size), None
    verify = verify_cost(target, config, chosen.form, chosen.kv, chosen.context)
    for name in ("1B", "3B", "8B"):
        if SIZES[name].n_params * 4 > config.n_params:
            continue
        beside = way(target, name, target.forms[-1], chosen.kv, min(chosen.context, SIZES[name].max_context))
        both = chosen.resident + beside.weights_nbytes + beside.kv_nbytes
        if beside.step is None or chosen.step is None or both > chosen.capacity:
            continue
        found = best_draft(ALPHA, beside.step / chosen.step, verify)
        if best is None or found.speedup > best[1].speedup:
            best = (name, found)
    if best is None or best[1].speedup <= 1:
        return f"A draft would not pay (α {ALPHA:g} assumed)."
    name, found = best
    taken = f"if {100 * ALPHA:.0f} % are accepted (assumed)"
    return f"Drafted by {name}: × {found.speedup:.2f} with {found.k} proposals, {taken}."


def _own_costs(
    target: Target,
    machine: Machine | None,
    chosen: Way,
    price: float | None,
    rent: float | None,
    watts: float | None,
) -> dict[str, OwnCost] | None:
    """Cost of a million tokens alone, and with as many sequences at once as fit and still pay; None without a
    price."""
    from ..plan.money import OVERHEAD
    from ..plan.prices import hourly, own_cost
    from ..plan.ways import model_config

    for name, value in (("price", price), ("usd-per-hour", rent), ("watts", watts)):
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"{name}={value:g} must be positive")
    count = 1
    if machine is not None:
        count = machine.count
        if price is None and rent is None:
            rent = machine.rent[0].usd * count if machine.rent else None
            price = None if rent or not machine.buy else machine.buy[0].usd * count
        watts = watts or machine.device.power * OVERHEAD * count
    if price is None and rent is None:
        return None
    fixed, working = hourly(price, rent, watts or 0.0)
    config = model_config(chosen.size)
    per = chosen.kv_nbytes / chosen.batch
    most = int((chosen.capacity - chosen.weights_nbytes - chosen.beside_nbytes) // per)
    tp = getattr(target, "tp", 1)
    replicas = max(1, count // tp)
    input_rate = chosen.context / (chosen.ttft or math.inf)
    costs = {}
    for name, batch in (("alone", 1), ("full", max(1, min(most, 256)))):
        output_rate = batch / target.decode(config, chosen.form, chosen.kv, chosen.context, batch)
        costs[name] = own_cost(replicas * input_rate, replicas * output_rate, fixed, working)
    return costs


def _print_money(size: str, costs: dict[str, OwnCost]) -> None:
    from ..plan import prices

    apis = [
        *prices.offers_for(f"Llama 3.1 {size}")[:3],
        *prices.offers_for("GPT-4o")[:1],
        *prices.offers_for("GPT-4o mini"),
        *prices.offers_for("Claude 3.5 Sonnet"),
    ]
    rows = [
        [
            f"here, {'one at a time' if name == 'alone' else 'full'}",
            f"{own.input:.2f}",
            f"{own.output:.2f}",
            f"{own.blended:.2f}",
            "",
        ]
        for name, own in costs.items()
    ]
    for api in apis:
        even = prices.break_even(costs["full"], api)
        said = (
            "never"
            if even.tokens is None
            else f"{even.tokens / 1e6:,.0f} M" + ("" if even.reachable else ", more than it makes")
        )
        rows.append(
            [
                f"{api.model}, {api.host} ({api.date})",
                f"{api.input:.2f}",
                f"{api.output:.2f}",
                f"{api.blended:.2f}",
                said,
            ]
        )
    print_table(["USD a million tokens", "in", "out", "3:1", "own is cheaper from, a month"], rows)


def _break_even_records(size: str, own: OwnCost) -> list[dict[str, Any]]:
    from ..plan import prices

    models = (f"Llama 3.1 {size}", "GPT-4o", "GPT-4o mini", "Claude 3.5 Sonnet")
    evens = [prices.break_even(own, api) for model in models for api in prices.offers_for(model)]
    return [
        dataclasses.asdict(even.api)
        | {
            "blended": even.api.blended,
            "tokens_a_month": even.tokens,
            "capacity": even.capacity,
            "reachable": even.reachable,
        }
        for even in evens
    ]


def _feel(target: Here, tables: dict[str, list[list[Way]]], size: str | None) -> None:
    from ..plan.feel import stream
    from ..plan.ways import best

    name, chosen = next(
        ((n, f) for n, rows in tables.items() if (f := best(rows)) is not None), (size or "8B", None)
    )
    if chosen is None or chosen.step is None or chosen.ttft is None:
        raise PlanError(f"{name} does not run here, so there is nothing to feel: try --size 1B")
    print(
        f"{name} in {chosen.form.name} here: {brief(chosen.ttft)} to read a prompt of {chosen.context:,} tokens, then "
        f"{1 / chosen.step:,.3g} tokens/s. At most 20 s of each; Ctrl-C stops.\n"
    )
    sys.stdout.flush()
    stream(chosen.ttft, 1 / chosen.step)
    print()


def way_record(found: Way) -> dict[str, Any]:
    return {
        "size": found.size,
        "weights": found.form.name,
        "kv": found.kv,
        "context": found.context,
        "batch": found.batch,
        "weights_bytes": found.weights_nbytes,
        "kv_bytes": found.kv_nbytes,
        "beside_bytes": found.beside_nbytes,
        "resident_bytes": found.resident,
        "capacity_bytes": found.capacity,
        "fits": found.fits,
        "ttft_seconds": found.ttft,
        "tokens_per_s": found.tokens_per_s,
        "kld_published": found.form.kld,
    }


def _profile_record(profile: Profile) -> dict[str, Any]:
    return dataclasses.asdict(profile)


def finite(record: Any) -> Any:
    """JSON has no infinity: None stands for it."""
    if isinstance(record, dict):
        return {key: finite(value) for key, value in record.items()}
    if isinstance(record, list):
        return [finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def brief(seconds: float) -> str:
    """Two digits and a unit: 0.4 s, 41 s, 6 min, 3.1 h, 2 days."""
    for scale, unit in ((172_800, "days"), (5_400, "h"), (90, "min")):
        if seconds >= scale:
            value = seconds / {"days": 86_400, "h": 3_600, "min": 60}[unit]
            return f"{value:,.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return (
        f"{1000 * seconds:.0f} ms"
        if seconds < 0.1
        else f"{seconds:.1f} s"
        if seconds < 10
        else f"{seconds:.0f} s"
    )
