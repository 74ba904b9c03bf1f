"""`herd plan`: which models run on this machine. `herd plan run`: one model on any machine, with its cost."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import units
from ..errors import PlanError
from ..plan.profile import SECONDS
from ..plan.quantity import COUNT, USD, Quantity
from . import plan_options as opt
from .common import Json, picked, print_json

if TYPE_CHECKING:
    from ..plan.prices import ApiPrice, OwnCost
    from ..plan.ways import MeasuredTarget, Target, Way

SIZES_HERE = ("1B", "3B", "8B", "70B")
WATTS = Quantity(1e-3, 1e12, COUNT, "120")
ALPHA = 0.7
"""Assumed acceptance rate of a draft model if none was measured. Models of one family reach 0.6 to 0.8."""


def plan_command(
    models: Annotated[
        list[opt.PlannedModel] | None,
        typer.Argument(parser=opt.model, metavar="MODEL", help=opt.ANY_MODEL, show_default="1B, 3B, 8B, 70B"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help=f"Measure this machine again ({SECONDS} s).")
    ] = False,
    feel: Annotated[bool, typer.Option("--feel", help="Print sample text at the predicted speed.")] = False,
    learned: opt.Learned = False,
    as_json: Json = False,
) -> None:
    """Print the best ways to run models on this machine, which is measured once. The verb may be left out."""
    from ..plan.ways import best_way, plan_ways

    target, chosen = opt.measured_target(learned, measure), models or map(opt.model, SIZES_HERE)
    tables = {name: plan_ways(target, config) for name, config in chosen}
    best = {name: best_way(rows) for name, rows in tables.items()}
    if feel:
        _show_speed(best)
        return
    if as_json:
        sizes = {
            name: [opt.way_record(name, way) for row in rows for way in row] for name, rows in tables.items()
        }
        print_json(
            {
                "profile": dataclasses.asdict(target.profile),
                "free_bytes": int(target.capacity),
                "learned": dict(target.factors),
                "sizes": sizes,
                "best": {name: found and opt.way_record(name, found) for name, found in best.items()},
            }
        )
        return
    _print_machine(target)
    for name, rows in tables.items():
        print()
        _print_ways(target, name, rows)
        if (way := best[name]) is not None:
            print(f"To run it:  {_shell_command(name, way)}")
            print(_draft_advice(target, way))
    print("\nLoss: mean KL divergence from 16 bits in nats, published for Llama 3 8B (llama.cpp).")
    print("Larger models lose less by quantization, smaller ones more.")
    if target.factors:
        factors = ", ".join(f"{kind} × {factor:.2f}" for kind, factor in target.factors.items())
        print(f"Corrected by this machine's own runs: {factors} (see herd plan score).")


def run_command(
    size: opt.Size = "8B",
    machine: opt.Where = "here",
    context: opt.Context = None,
    batch: Annotated[opt.Number, opt.count("Sequences at the same time.", 1e6)] = "1",
    price: Annotated[
        opt.Number, opt.number(USD, "Price of the whole machine in USD (default: the catalogue's).")
    ] = None,
    usd_per_hour: Annotated[
        opt.Number, opt.number(USD, "Rent of the whole machine per hour in USD (default: the catalogue's).")
    ] = None,
    watts: Annotated[opt.Number, opt.number(WATTS, "Power under load in watts.")] = None,
    machines: opt.Machines = None,
    learned: opt.Learned = False,
    as_json: Json = False,
) -> None:
    """Plan to run one model on one machine.

    Prints memory, waiting time, tokens/s, and the cost compared with APIs.
    """
    from ..plan.ways import best_way, plan_ways, smallest_change

    name, config = size
    context = opt.usual_context(context, size)
    target = opt.find_target(machine, machines, config, learned)
    rows = plan_ways(target, config, (context,), batch)
    chosen = best_way(rows)
    costs = None if chosen is None else _own_costs(target, chosen, price, usd_per_hour, watts)
    if as_json:
        record = {
            "machine": target.name,
            "tp": target.tp,
            "ways": [opt.way_record(name, row[0]) for row in rows],
            "best": chosen and opt.way_record(name, chosen),
            "no": None if chosen else smallest_change(target, config, context, batch),
            "usd_per_million": None if costs is None else {k: _with_blended(v) for k, v in costs.items()},
            "break_even": [] if costs is None else _break_even_records(name, costs["full"]),
        }
        print_json(record)
        return
    _print_ways(target, name, rows)
    if chosen is None:
        return
    if machine == "here":
        print(f"To run it:  {_shell_command(name, chosen)}")
    print(_draft_advice(target, chosen))
    if costs is not None:
        print()
        _print_money(name, costs)
    elif machine == "here":
        print("For the cost, give the machine's price (--price, --watts) or rent (--usd-per-hour).")


def _print_machine(target: MeasuredTarget) -> None:
    found = target.profile
    shown = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "i8mm")
    isa = ", ".join(name for name in found.isa if name in shown)
    memory = f"{units.nbytes(found.memory)} of memory, {units.nbytes(target.capacity)} free"
    print(f"This machine: {found.cpu}, {found.cores} cores ({isa}), {memory}")
    threads = ", ".join(f"{rate / 1e9:.1f} with {n}" for n, rate in found.bandwidth.items())
    rates = ", ".join(f"{name} {max(by_rows.values()) / 1e9:,.0f}" for name, by_rows in found.gemm.items())
    print(f"Reads memory at GB/s: {threads} threads. Matmul GOP/s: {rates}.")
    disk = f"{units.si(found.disk, 'B/s')} from disk" if found.disk else "Disk not measured"
    gpus = "; ".join(
        f"{gpu.name}, {units.nbytes(gpu.memory)}, {units.si(gpu.bandwidth, 'B/s')}, "
        f"bf16 {units.si(gpu.bf16, 'FLOP/s')}"
        for gpu in found.gpus
    )
    print(f"{disk}. GPUs: {gpus or 'none'}. Measured {found.date[:10]} in {found.seconds:.0f} s.")


def _print_ways(target: Target, name: str, rows: list[list[Way]]) -> None:
    """Print the ways that fit with their times by context, or the smallest change that would make one fit."""
    from ..plan.ways import best_way, smallest_change

    chosen, first = best_way(rows), rows[0][0]
    title = f"{name} on {target.name}" + (f", {first.batch} at once" if first.batch > 1 else "")
    if chosen is None:
        change = opt.sentence(smallest_change(target, first.config, first.context, first.batch))
        print(f"{title}: does not fit, not even with {first.context:,} tokens.\n{change}")
        return
    print(title)
    contexts = [way.context for way in rows[0]]
    header = "weights|KV|GB|" + "".join(f"{_context_text(length)}: wait|tokens/s|" for length in contexts)
    table = []
    for row in rows:
        if row[0].fits:
            mark = "*" if row[0].weights is chosen.weights and row[0].kv == chosen.kv else ""
            line = f"{row[0].weights.name}{mark}|{row[0].kv}|{units.short(row[0].resident / 1e9)}|"
            for way in row:
                line += "–|–|" if way.ttft is None else f"{units.duration(way.ttft)}|{way.tokens_per_s:,.3g}|"
            kld = row[0].weights.kld
            table.append(line + ("?" if kld is None else f"{kld:.3f}"))
    opt.print_rows(header + "loss", table)
    for index, length in enumerate(contexts):
        if not any(row[index].fits for row in rows):
            change = opt.sentence(smallest_change(target, first.config, length, first.batch))
            print(f"{_context_text(length)}: does not fit. {change}")


def _shell_command(name: str, way: Way) -> str:
    """Return the command that runs the model. Of a published size: the name of its instruct version."""
    from ..checkpoint.catalogue import find_name
    from ..llama.config import SIZES

    if name in SIZES:
        name = f"llama{'3.2' if name in ('1B', '3B') else '3.1'}-{name.lower()}"
    known = find_name(name)
    source = known[1].source if known else name
    if way.weights.name in source.upper() or (known is None and source.endswith(".gguf")):
        return f"herd chat {name}"  # a file of these formats, or of others that are chosen already
    if known and find_name(f"{known[0]}-bf16"):
        name = f"{known[0]}-bf16"
    if way.weights.name == "bf16":
        return f"herd chat {name} --dtype bf16"
    out = f"{name.rpartition('/')[2]}-{way.weights.name}"
    return f"herd quantize {name} --to {way.weights.name} --out {out} && herd chat {out}"


def _draft_advice(target: Target, chosen: Way) -> str:
    """Return a sentence on whether a smaller model of the family would pay as a draft model."""
    from ..llama.config import SIZES
    from ..plan.serve import best_draft, verify_cost
    from ..plan.ways import plan_way

    config = chosen.config
    verify = verify_cost(target, config, chosen.weights, chosen.kv, chosen.context)
    tried = []
    for name in ("1B", "3B", "8B"):
        small = SIZES[name]
        if small.n_params * 4 > config.n_params or small.vocab_size != config.vocab_size:
            continue
        context = min(chosen.context, small.max_context)
        draft = plan_way(target, small, target.formats[-1], chosen.kv, context)
        both = chosen.resident + draft.weights_nbytes + draft.kv_nbytes
        if draft.step is not None and chosen.step is not None and both <= chosen.capacity:
            tried.append((best_draft(ALPHA, draft.step / chosen.step, verify), name))
    plan, name = max(tried, key=lambda pair: pair[0].speedup, default=(None, ""))
    if plan is None or plan.speedup <= 1:
        return f"A draft model would not pay (assuming an acceptance rate of {ALPHA:g})."
    rate = f"if {100 * ALPHA:.0f} % are accepted (assumed)"
    return f"With {name} as a draft model: × {plan.speedup:.2f} with {plan.k} draft tokens, {rate}."


def _own_costs(
    target: Target, chosen: Way, price: float | None, rent: float | None, watts: float | None
) -> dict[str, OwnCost] | None:
    """Return the cost of a million tokens, for one sequence and for as many as fit; None without a price."""
    from ..plan.money import OVERHEAD
    from ..plan.prices import hourly_cost, own_cost
    from ..plan.ways import CatalogueTarget

    devices = 1
    if isinstance(target, CatalogueTarget):
        machine, devices = target.machine, target.machine.count
        if price is None and rent is None:
            rent = machine.rent[0].usd * devices if machine.rent else None
            price = None if rent or not machine.buy else machine.buy[0].usd * devices
        watts = watts or machine.device.power * OVERHEAD * devices
    if price is None and rent is None:
        return None
    fixed, working = hourly_cost(price, rent, watts or 0.0)
    most = int(chosen.spare // (chosen.kv_nbytes / chosen.batch))
    replicas = max(1, devices // target.tp)
    input_rate = replicas * chosen.context / (chosen.ttft or math.inf)
    costs = {}
    for name, batch in (("alone", 1), ("full", max(1, min(most, 256)))):
        step = target.decode(chosen.config, chosen.weights, chosen.kv, chosen.context, batch)
        costs[name] = own_cost(input_rate, replicas * batch / step, fixed, working)
    return costs


def _rival_offers(size: str) -> list[list[ApiPrice]]:
    from ..plan.prices import offers_for

    models = (f"Llama 3.1 {size}", "GPT-4o", "GPT-4o mini", "Claude 3.5 Sonnet")
    return [offers_for(model) for model in models]


def _print_money(size: str, costs: dict[str, OwnCost]) -> None:
    from ..plan.prices import break_even

    own = costs["full"]
    rows = [
        f"here, {what}|{costs[name].input:.2f}|{costs[name].output:.2f}|{costs[name].blended:.2f}|"
        for name, what in (("alone", "one sequence at a time"), ("full", "as many as fit"))
    ]
    hosts, gpt4o, mini, claude = _rival_offers(size)
    for api in [*hosts[:3], *gpt4o[:1], *mini, *claude]:
        even = break_even(own, api)
        volume = "never" if even.tokens is None else f"{even.tokens / 1e6:,.0f} M"
        if even.tokens is not None and not even.reachable:
            volume += ", more than it can generate"
        prices = f"{api.input:.2f}|{api.output:.2f}|{api.blended:.2f}"
        rows.append(f"{api.model}, {api.host} ({api.date})|{prices}|{volume}")
    opt.print_rows("USD per million tokens|in|out|3:1|own machine is cheaper from, per month", rows)


def _break_even_records(size: str, own: OwnCost) -> list[dict[str, Any]]:
    from ..plan.prices import break_even

    evens = [break_even(own, api) for offers in _rival_offers(size) for api in offers]
    names = "tokens_a_month=tokens capacity reachable"
    return [_with_blended(even.api) | picked(even, names) for even in evens]


def _with_blended(price: OwnCost | ApiPrice) -> dict[str, Any]:
    return dataclasses.asdict(price) | {"blended": price.blended}


def _show_speed(best: dict[str, Way | None]) -> None:
    """Print sample text at the speed of the first size that fits."""
    from ..plan.feel import print_at_speed

    name, chosen = next((pair for pair in best.items() if pair[1] is not None), ("", None))
    if chosen is None or chosen.step is None or chosen.ttft is None:
        raise PlanError(f"{next(iter(best))} does not fit here, so its speed cannot be shown: try 1B")
    print(
        f"{name} in {chosen.weights.name} here: {units.duration(chosen.ttft)} to read a prompt of "
        f"{chosen.context:,} tokens, then {1 / chosen.step:,.3g} tokens/s. At most 20 s of each; Ctrl-C "
        "stops.\n"
    )
    sys.stdout.flush()
    print_at_speed(chosen.ttft, 1 / chosen.step)
    print()


def _context_text(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"
