"""`herd plan serve`, `draft` and `score`: users, speculation, and how accurate earlier predictions were."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from .. import units
from ..errors import PlanError
from ..plan.quantity import CONTEXT, TIME, Quantity
from . import plan_options as opt
from .common import Json, picked, print_json
from .plan_local import ALPHA

if TYPE_CHECKING:
    from ..llama.config import ModelConfig
    from ..plan.serve import Load, Served
    from ..plan.ways import Target

RATE = Quantity(0, 0.999, {"": 1}, "0.7")


def serve_command(
    size: opt.Size = "8B",
    machine: opt.Where = "here",
    users: Annotated[opt.Number, opt.count("People who use it at the same time.", 1e9)] = "50",
    prompt: Annotated[opt.Number, opt.count("Tokens of a prompt.", 2**40, CONTEXT)] = "2k",
    answer: Annotated[opt.Number, opt.count("Tokens of an answer.", 2**40, CONTEXT)] = "400",
    think: Annotated[opt.Number, opt.number(TIME, "Time between an answer and the next request.")] = "30s",
    p95_ttft: Annotated[
        opt.Number, opt.number(TIME, "Longest accepted time to first token (95th percentile).")
    ] = "10s",
    usd_per_hour: opt.UsdPerHour = None,
    machines: opt.Machines = None,
    learned: opt.Learned = False,
    commands: Annotated[
        str | None, Option("--print", help="vllm: print the commands that run the best way with vLLM.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict whether a machine can serve many users.

    Prints batch, waiting time and tokens/s for each way of splitting the machine into replicas.
    """
    if commands not in (None, "vllm"):
        raise PlanError(f"--print {commands}: only vllm is known")
    from ..plan.serve import Load, predict_serving
    from ..plan.ways import CatalogueTarget

    load = Load(users, prompt, answer, think)
    name, config = size
    target = opt.find_target(machine, machines, config, learned)
    splits: list[tuple[Target, int]] = [(target, 1)]
    if isinstance(target, CatalogueTarget):
        powers = (1 << n for n in range(target.tp.bit_length()))
        splits = [(dataclasses.replace(target, tp=tp), target.machine.count // tp) for tp in powers]
    found = [
        predict_serving(part, config, weights, load, replicas)
        for part, replicas in splits
        for weights in part.formats
    ]
    found.sort(key=lambda served: served.rank(p95_ttft))
    able = [served for served in found if served.meets(p95_ttft)]
    if as_json:
        records = [_served_record(served, p95_ttft) for served in found]
        print_json({"machine": target.name, "meets": bool(able), "splits": records})
        return
    asked = f"{users} users, {prompt:,} tokens in, {answer:,} out, {think:g} s between requests"
    print(f"{name} on {target.name}: {asked}\n")
    opt.print_rows(
        "weights|replicas|at once|of|requests/s|TTFT|p95|s/token|tokens/s|",
        (_served_row(served, p95_ttft) for served in found[:12]),
    )
    if not able:
        print(f"\nNo. {_serving_change(target, config, load, p95_ttft, found)}")
        return
    best = min(able, key=lambda served: (served.way.weights.loss, served.ttft_p95))
    print(
        f"\nYes: {best.way.weights.name} weights, {best.replicas} replica{'s' if best.replicas > 1 else ''}; "
        f"{best.output_tokens_per_s:,.0f} tokens/s out, 95th percentile of the time to first token "
        f"{units.duration(best.ttft_p95)}."
    )
    if isinstance(target, CatalogueTarget):
        _print_rent(target, name, load, best, usd_per_hour)
    if commands is not None:
        _print_commands(name, target, best, splits, load)


def _print_commands(
    name: str, target: Target, best: Served, splits: list[tuple[Target, int]], load: Load
) -> None:
    """Print the commands that run the best way with vLLM."""
    from ..plan.vllm import vllm_commands
    from ..plan.ways import CatalogueTarget

    if not isinstance(target, CatalogueTarget):
        raise PlanError("--print vllm needs GPUs: name them with --machine; here, serve with herd serve")
    tp = next(part.tp for part, replicas in splits if replicas == best.replicas)
    print()
    print("\n".join(vllm_commands(name, best, target.machine, tp, load)))


def _print_rent(target: Any, size: str, load: Load, best: Served, usd_per_hour: float | None) -> None:
    from ..plan.prices import offers_for

    rent = usd_per_hour or (target.machine.rent[0].usd if target.machine.rent else None)
    if rent is None:
        return
    tokens = best.replicas * best.requests_per_s * 3600 * (load.prompt + load.answer)
    own = 1e6 * rent * target.machine.count / tokens
    print(f"Rented at {rent:.2f} USD per hour and device: {own:,.2f} USD per million tokens at this load.")
    if hosts := offers_for(f"Llama 3.1 {size}"):
        cheapest = f"{hosts[0].blended:.2f} USD (3:1, {hosts[0].host}, {hosts[0].date})"
        print(f"The cheapest host of Llama 3.1 {size} asks {cheapest}.")


def draft_command(
    size: opt.Size = "70B",
    draft: Annotated[Any, opt.model_option("The draft model: a size or any model.")] = "8B",
    machine: opt.Where = "here",
    context: opt.Context = None,
    alpha: Annotated[opt.Number, opt.number(RATE, "Acceptance rate of draft tokens.")] = str(ALPHA),
    k: Annotated[opt.Number, opt.count("Draft tokens per round (default: all from 1 to 8).", 64)] = None,
    machines: opt.Machines = None,
    learned: opt.Learned = False,
    as_json: Json = False,
) -> None:
    """Predict whether a draft model pays.

    A draft model proposes tokens, and the large model verifies them together.
    """
    from ..plan.serve import best_draft, predict_draft, verify_cost
    from ..plan.ways import best_way, plan_way, plan_ways, smallest_change

    name, config = size
    if draft.config.n_params >= config.n_params:
        raise PlanError(
            f"the draft model {draft.name} is no smaller than its target {name}: choose a smaller one"
        )
    context = opt.usual_context(context, size, draft)
    target = opt.find_target(machine, machines, config, learned)
    chosen = best_way(plan_ways(target, config, (context,)))
    if chosen is None:
        raise PlanError(f"{name} does not fit on {target.name}: {smallest_change(target, config, context)}")
    small = plan_way(target, draft.config, target.formats[-1], chosen.kv, context)
    if chosen.step is None or small.step is None:
        raise PlanError(f"the draft model {draft.name} does not fit on {target.name} at {context:,} tokens")
    cost = small.step / chosen.step
    verify = verify_cost(target, config, chosen.weights, chosen.kv, context)
    tried = [predict_draft(alpha, cost, n, verify) for n in ([k] if k is not None else range(1, 9))]
    fits = chosen.resident + small.weights_nbytes + small.kv_nbytes <= chosen.capacity
    rates = (percent / 100 for percent in range(1, 100))
    pays_from = next((rate for rate in rates if best_draft(rate, cost, verify).speedup > 1), None)
    if as_json:
        print_json(
            {
                "target": opt.way_record(name, chosen),
                "draft": opt.way_record(draft.name, small),
                "c": cost,
                "both_fit": fits,
                "pays_from_alpha": pays_from,
                "rounds": [dataclasses.asdict(plan) | {"speedup": plan.speedup} for plan in tried],
            }
        )
        return
    print(
        f"{name} in {chosen.weights.name} at {1 / chosen.step:,.3g} tokens/s with {draft.name} in "
        f"{small.weights.name} ({1 / small.step:,.3g} tokens/s)\nas a draft model on {target.name}: c = "
        f"{cost:.3f}, α = {alpha:g}\n"
    )
    rows = []
    for plan in tried:
        gain = f"{plan.speedup:.2f}|{plan.speedup / chosen.step:,.3g}"
        rows.append(f"{plan.k}|{plan.tokens_a_round:.2f}|{plan.round_cost:.2f}|{gain}")
    opt.print_rows("k|tokens per round|cost in steps|speed-up|tokens/s", rows)
    best = max(tried, key=lambda plan: plan.speedup)
    pays = f"It pays: k = {best.k}, × {best.speedup:.2f}." if best.speedup > 1 else "It does not pay."
    level = "It would never pay here." if pays_from is None else f"It pays from α = {pays_from:.2f}."
    print(f"\n{pays} {level}" + ("" if fits else " But the two do not fit together."))


def score_command(as_json: Json = False) -> None:
    """Compare predictions with what this machine's own runs took."""
    from ..plan.score import read_history, summarize_errors

    events = read_history()
    kinds = summarize_errors(events)
    if as_json:
        records = [dataclasses.asdict(event) | {"error": event.error} for event in events]
        print_json({"events": records, "kinds": [dataclasses.asdict(kind) for kind in kinds]})
        return
    if not events:
        print("Nothing to compare yet: run herd plan once, then herd bench or herd raise.")
        return
    rows = []
    for kind in kinds:
        errors = f"{100 * kind.median_error:.1f} %|{100 * kind.worst_error:.1f} %"
        rows.append(f"{kind.kind}|{kind.n}|{errors}|{kind.factor:.2f}")
    opt.print_rows("predicted|runs|median error|worst|measured / predicted", rows)
    print()
    latest = []
    for event in events[-12:]:
        show = units.nbytes if event.unit == "bytes" else units.duration
        values = f"{show(event.predicted)}|{show(event.measured)}|{100 * event.error:+.1f} %"
        latest.append(f"{event.kind}, {event.what}|{values}|{event.date[:10]}")
    opt.print_rows("latest|predicted|measured|error|date", latest)


def _served_row(served: Served, bar: float) -> str:
    head = f"{served.way.weights.name}|{served.replicas}"
    if served.most_batch < 1:
        return f"{head}{'|–' * 7}|does not fit"
    if not served.stable:
        return f"{head}|∞|{served.most_batch}{'|–' * 5}|too slow"
    rate = served.replicas * served.requests_per_s
    waits = f"{units.duration(served.ttft_mean)}|{units.duration(served.ttft_p95)}"
    verdict = "ok" if served.meets(bar) else "waits too long" if served.fits else "memory"
    return (
        f"{head}|{served.batch:.1f}|{served.most_batch}|{rate:.2f}|{waits}|{served.tpot:.3f}|"
        f"{served.output_tokens_per_s:,.0f}|{verdict}"
    )


def _serving_change(
    target: Target, config: ModelConfig, load: Load, bar: float, options: list[Served]
) -> str:
    """Return the number of users that the machine would serve, or the change that makes the model fit."""
    from ..plan.serve import predict_serving
    from ..plan.ways import smallest_change

    if not any(served.most_batch for served in options):
        return opt.sentence(smallest_change(target, config, load.prompt + load.answer))
    low, high = 0, load.users
    while high - low > 1:
        middle = (low + high) // 2
        fewer = dataclasses.replace(load, users=middle)
        if any(predict_serving(target, config, weights, fewer).meets(bar) for weights in target.formats):
            low = middle
        else:
            high = middle
    if low:
        return f"It would serve {low} users in time."
    return "Not even one user: shorten --prompt, raise --p95-ttft, or use a faster machine."


def _served_record(served: Served, bar: float) -> dict[str, Any]:
    names = (
        "weights=way.weights.name output_tokens_per_s replicas answer stable batch requests_per_s ttft_mean "
        "ttft_p95 tpot prefill_share fits most_batch"
    )
    return picked(served, names) | {"meets": served.meets(bar)}
