"""`herd plan serve`, `draft`, `score`: how many users, whether speculation pays, and whether the plans were
right."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PlanError
from .common import Json, print_json, print_table
from .plan_local import (
    ALPHA,
    Machines,
    Size,
    Where,
    brief,
    finite,
    sentence,
    size_name,
    target_of,
    way_record,
)

if TYPE_CHECKING:
    from ..plan.serve import Served
    from ..plan.ways import Target


def serve(
    size: Size = "8B",
    machine: Where = "here",
    users: Annotated[int, typer.Option(help="People at it.")] = 50,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "2k",
    answer: Annotated[str, typer.Option(help="Tokens of an answer.")] = "400",
    think: Annotated[str, typer.Option(help="Time between an answer and the next request.")] = "30s",
    p95_ttft: Annotated[str, typer.Option("--p95-ttft", help="Bar for the time to the first token.")] = "10s",
    usd_per_hour: Annotated[float | None, typer.Option(help="USD an hour a device rents for.")] = None,
    machines: Machines = None,
    as_json: Json = False,
) -> None:
    """How many users a machine serves: batch, waiting, tokens/s, for each way of splitting it; an analytic
    model."""
    from ..plan import prices, quantity
    from ..plan.serve import Load, serve
    from ..plan.ways import There, model_config

    size, config = size_name(size), model_config(size_name(size))
    load = Load(
        users,
        quantity.context(prompt, "prompt"),
        quantity.context(answer, "answer"),
        quantity.seconds(think, "think"),
    )
    bar = quantity.seconds(p95_ttft, "p95-ttft")
    target, known = target_of(machine, machines, config)
    splits: list[tuple[Target, int]] = [(target, 1)]
    if known is not None and isinstance(target, There):
        splits = [
            (There(known, tp), known.count // tp) for tp in (1 << n for n in range(target.tp.bit_length()))
        ]
    found = [serve(part, size, form, load, replicas) for part, replicas in splits for form in part.forms]
    able = [served for served in found if served.meets(bar)]
    found.sort(
        key=lambda s: (
            not s.meets(bar),
            not s.fits,
            s.way.form.kld is None,
            s.way.form.kld or 0.0,
            s.ttft_p95,
        )
    )
    if as_json:
        print_json(
            finite(
                {
                    "machine": target.name,
                    "meets": bool(able),
                    "splits": [_served_record(s, bar) for s in found],
                }
            )
        )
        return
    asked = f"{users} users, {load.prompt:,} tokens in, {load.answer:,} out, {load.think:g} s between"
    print(f"{size} on {target.name}: {asked}\n")
    print_table(
        ["weights", "replicas", "at once", "of", "requests/s", "TTFT", "p95", "s/token", "tokens/s", ""],
        [_served_row(served, bar) for served in found[:12]],
    )
    if not able:
        print(f"\nNo. {_serve_change(target, size, load, bar, found)}")
        return
    best = min(able, key=lambda s: (s.way.form.kld if s.way.form.kld is not None else 0.02, s.ttft_p95))
    print(
        f"\nYes: {best.way.form.name} weights, {best.replicas} replica{'s' if best.replicas > 1 else ''}; "
        f"{best.output_tokens_per_s:,.0f} tokens/s out, p95 to the first token {brief(best.ttft_p95)}."
    )
    rent = usd_per_hour or (known.rent[0].usd if known is not None and known.rent else None)
    if rent is not None and known is not None:
        tokens = best.replicas * best.requests_per_s * 3600 * (load.prompt + load.answer)
        own = 1e6 * rent * known.count / tokens
        print(
            f"Rented at {rent:.2f} USD an hour and device: {own:,.2f} USD a million tokens in and out, at this load."
        )
        if hosts := prices.offers_for(f"Llama 3.1 {size}"):
            print(
                f"Hosts of Llama 3.1 {size} ask from {hosts[0].blended:.2f} (3:1, {hosts[0].host}, {hosts[0].date})."
            )


def draft(
    size: Size = "70B",
    draft_size: Annotated[str, typer.Option("--draft", help="The draft's size.")] = "8B",
    machine: Where = "here",
    context: Annotated[str, typer.Option(help="Tokens of a sequence: 8192, 32k, 128k.")] = "8192",
    alpha: Annotated[float, typer.Option(help="Share of proposals that are accepted.")] = ALPHA,
    k: Annotated[int | None, typer.Option(help="Proposals a round; all from 1 to 8 if not given.")] = None,
    machines: Machines = None,
    as_json: Json = False,
) -> None:
    """Does speculation pay? A small model proposes, the large one verifies several tokens in one pass."""
    from ..plan import quantity
    from ..plan import serve as model
    from ..plan.ways import best, model_config, smallest_change, way, ways

    size, small = size_name(size), size_name(draft_size)
    if model_config(small).n_params >= model_config(size).n_params:
        raise PlanError(f"a draft of {small} is no smaller than its target of {size}: choose a smaller one")
    length = quantity.context(context)
    target, _ = target_of(machine, machines, model_config(size))
    chosen = best(ways(target, size, (length,)))
    if chosen is None:
        raise PlanError(f"{size} does not fit on {target.name}: {smallest_change(target, size, length)}")
    beside = way(target, small, target.forms[-1], chosen.kv, length)
    if chosen.step is None or beside.step is None:
        raise PlanError(f"a draft of {small} does not fit on {target.name} at {length:,} tokens")
    cost = beside.step / chosen.step
    verify = model.verify_cost(target, model_config(size), chosen.form, chosen.kv, length)
    tried = [model.draft(alpha, cost, n, verify) for n in ([k] if k is not None else range(1, 9))]
    top = max(tried, key=lambda found: found.speedup)
    fits = chosen.resident + beside.weights_nbytes + beside.kv_nbytes <= chosen.capacity
    level = next(
        (a / 100 for a in range(1, 100) if model.best_draft(a / 100, cost, verify).speedup > 1), None
    )
    if as_json:
        rows = [dataclasses.asdict(found) | {"speedup": found.speedup} for found in tried]
        print_json({"target": way_record(chosen), "draft": way_record(beside), "c": cost, "both_fit": fits,
                    "pays_from_alpha": level, "rounds": rows})  # fmt: skip
        return
    print(
        f"{size} in {chosen.form.name} at {1 / chosen.step:,.3g} tokens/s, drafted by {small} in {beside.form.name} "
        f"({1 / beside.step:,.3g} tokens/s) on {target.name}: c = {cost:.3f}, α = {alpha:g}\n"
    )
    print_table(
        ["k", "tokens a round", "cost in steps", "speed-up", "tokens/s"],
        [
            [str(found.k), f"{found.tokens_a_round:.2f}", f"{found.round_cost:.2f}", f"{found.speedup:.2f}",
             f"{found.speedup / chosen.step:,.3g}"]
            for found in tried
        ],
    )  # fmt: skip
    pays = f"It pays: k = {top.k}, × {top.speedup:.2f}." if top.speedup > 1 else "It does not pay."
    from_ = "It never would here." if level is None else f"It pays from α = {level:.2f}."
    print(f"\n{pays} {from_}" + ("" if fits else " But the two do not fit together."))


def score(as_json: Json = False) -> None:
    """Was the plan right? Predicted against measured, from this machine's own runs."""
    from ..plan import score as scores

    events = scores.history()
    found = scores.summaries(events)
    if as_json:
        print_json({"events": [dataclasses.asdict(e) | {"error": e.error} for e in events],
                    "kinds": [dataclasses.asdict(s) for s in found]})  # fmt: skip
        return
    if not events:
        print("Nothing to compare yet: run herd plan once, then herd bench or herd raise.")
        return
    print_table(
        ["predicted", "runs", "median error", "worst", "measured / predicted"],
        [
            [
                s.kind,
                str(s.n),
                f"{100 * s.median_error:.1f} %",
                f"{100 * s.worst_error:.1f} %",
                f"{s.factor:.2f}",
            ]
            for s in found
        ],
    )
    print()
    print_table(
        ["latest", "predicted", "measured", "error", "date"],
        [
            [f"{e.kind}, {e.what}", _value(e.predicted, e.unit), _value(e.measured, e.unit), f"{100 * e.error:+.1f} %",
             e.date[:10]]
            for e in events[-12:]
        ],
    )  # fmt: skip


def _served_row(served: Served, bar: float | None) -> list[str]:
    if not served.fits and served.most_batch < 1:
        return [served.way.form.name, str(served.replicas), *["–"] * 7, "does not fit"]
    if not served.stable:
        return [
            served.way.form.name,
            str(served.replicas),
            "∞",
            str(served.most_batch),
            *["–"] * 5,
            "too slow",
        ]
    why = "ok" if served.meets(bar) else "memory" if not served.fits else "waits too long"
    return [
        served.way.form.name,
        str(served.replicas),
        f"{served.batch:.1f}",
        str(served.most_batch),
        f"{served.replicas * served.requests_per_s:.2f}",
        brief(served.ttft_mean),
        brief(served.ttft_p95),
        f"{served.tpot:.3f}",
        f"{served.output_tokens_per_s:,.0f}",
        why,
    ]


def _serve_change(target: Target, size: str, load: Any, bar: float | None, found: list[Served]) -> str:
    """The largest number of users that the best split still serves, or what makes it fit."""
    from ..plan.serve import serve
    from ..plan.ways import smallest_change

    if not any(served.most_batch for served in found):
        return sentence(smallest_change(target, size, load.prompt + load.answer))
    low, high = 0, load.users
    while high - low > 1:
        middle = (low + high) // 2
        less = dataclasses.replace(load, users=middle)
        if any(serve(target, size, form, less).meets(bar) for form in target.forms):
            low = middle
        else:
            high = middle
    if low:
        return f"{low} users would be served as asked."
    return "Not even one user: shorten --prompt, raise --p95-ttft, or take a faster machine."


def _served_record(served: Served, bar: float | None) -> dict[str, Any]:
    return {
        "weights": served.way.form.name,
        "meets": served.meets(bar),
        "output_tokens_per_s": served.output_tokens_per_s,
        **{k: v for k, v in dataclasses.asdict(served).items() if k != "way"},
    }


def _value(value: float, unit: str) -> str:
    from ..report.units import nbytes

    return nbytes(value) if unit == "bytes" else brief(value)
