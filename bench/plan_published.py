"""Compare the planner with published runs. There are five receipts, plan-NAME.

    python bench/plan_published.py

Only arithmetic is done: predictions are compared with what others measured (``published_runs.yaml``). Meta's rows
are predicted from data sheets and published measurements of matmuls, attention and collectives alone. For
torchtitan and gpt-fast a few factors of their software are fitted: every row is predicted with factors fitted
to the other half of the rows, and to be harder, each family of rows with factors fitted to the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import published_runs as published
from common import bench_parser, save_receipt
from failures import simulate_run
from fitting import cross_fit, fit_factors
from herd.errors import QuantError
from herd.llama.config import SIZES, ModelConfig
from herd.plan import machines, shard_files
from herd.plan.goodput import RESTART, young_daly
from herd.plan.layout import PLAIN_RECOMPUTES, Job
from herd.plan.leak import GPU_HOURS, TRAINING_TOKENS
from herd.plan.ops import decode_seconds
from herd.plan.roofline import EfficiencyCurve
from herd.plan.search import search
from herd.plan.step import HARDWARE, Tuning, model_flops_utilization, predict_step, step_time
from herd.plan.training import default_batch
from herd.quant.formats import BF16, FORMATS, TYPES, Format, Scheme, scheme
from herd.report.receipt import Value
from herd.train.memory import state_nbytes

GUESSED_MFU = 0.5  # what a planner without a model assumes: llm-analysis takes 0.5 to 0.7
Values = dict[str, Value | tuple[Any, str]]


def within(value: float, bar: float) -> dict[str, Any]:
    """A bar on the absolute relative error."""
    return {"bar": f"≤ {100 * bar:g} %", "passed": abs(value) <= bar}


def percent(value: float) -> float:
    return round(100 * value, 2)


def checkpoint_nbytes(config: ModelConfig, format: str | Format) -> int:
    """Return the bytes of all weights in a GGUF format.

    As `herd quantize` writes them: norms in F32, the head of a 4-bit model in 8 bits. In bf16, 2 bytes for
    everything.
    """
    found = TYPES[format] if isinstance(format, str) else format
    if found is BF16:
        return config.nbytes(2.0)
    return (scheme(found) if found.name in FORMATS else Scheme(found, found, found)).nbytes(config)


def block_formats(config: ModelConfig) -> dict[str, int]:
    """Return the bytes by GGUF format, for every weight format that the model's rows divide into."""
    found = {}
    for name in TYPES:
        if name[0] in "IF" and name not in ("F32", "F16") and not name.startswith("IQ"):
            continue  # I8 and similar, F64: types of data, not formats of weights
        if name.endswith("8_1") or name == "Q8_K":
            continue  # only for activations
        try:
            found[name] = checkpoint_nbytes(config, name)
        except QuantError:
            continue
    return found


def sizes_receipt() -> None:
    """Exact sizes, and the three published forms of 405B."""
    values: Values = {}
    for name, config in SIZES.items():
        values[f"{name} parameters"] = (config.n_params, "parameters")
        values[f"{name} KV per token, bf16"] = (config.kv_nbytes_per_token(), "bytes")
        for form, nbytes in block_formats(config).items():
            values[f"{name} {form}"] = (nbytes, "bytes")
    computed = shard_files.computed_405b()
    values["405B FP8"] = (computed["FP8"], "bytes")
    for form, shards in shard_files.PUBLISHED_405B.items():
        error = computed[form] / shards.nbytes - 1
        print(
            f"405B {form:5} {computed[form] / 1e9:8.3f} GB, published {shards.nbytes / 1e9:8.3f}, "
            f"{100 * error:+.4f} %"
        )
        values[f"405B {form} against the published shards"] = Value(
            round(100 * error, 5), "%", **within(error, 0.0005) | {"bar": "≤ 0.05 %"}
        )
    save_receipt("plan-sizes", what="exact sizes; published 405B shards", values=values)


def meta_receipt() -> None:
    """Layouts, GPU hours, the rank of Meta's own layouts."""
    values: Values = {}
    predicted = []
    print(f"\nMeta, table 4, from hardware data alone; a constant {100 * GUESSED_MFU:.0f} % for comparison")
    for index, row in enumerate(published.META):
        machine = machines.find_machine(f"{row.devices}xH100")
        found = model_flops_utilization(row.job, machine, predict_step(row.job, row.layout, machine).seconds)
        predicted.append(found)
        error, naive = found / row.mfu - 1, GUESSED_MFU / row.mfu - 1
        name = f"{row.layout}, {row.job.context:,}"
        print(
            f"  {name:36} MFU {100 * found:5.1f} %, published {100 * row.mfu:.0f}, {100 * error:+5.1f} %; "
            f"{100 * naive:+5.1f} %"
        )
        values[f"MFU {index + 1}: {name}"] = (percent(found), "%")
        values[f"MFU {index + 1}, published"] = (percent(row.mfu), "%")
        values[f"MFU {index + 1} error"] = Value(percent(error), "%", **within(error, 0.15))
        values[f"MFU {index + 1} error of a constant {GUESSED_MFU:g}"] = (percent(naive), "%")
        rank_values(values, index, row, machine)
    ordered = predicted == sorted(predicted, reverse=True)
    values["layouts in the published order"] = Value(ordered, "1", bar="true", passed=ordered)
    hours_values(values)
    save_receipt(
        "plan-meta",
        what="Meta's published layouts and GPU hours, predicted from hardware data alone",
        values=values,
        notes="Rank: of all configurations that fit (TP × CP × PP × DP, micro-batch, pieces, "
        "recomputation, sharding), and of the best one of each TP × CP × PP × DP. Without checkpoints "
        "every matmul's input is kept, SwiGLU fused: with a fourth tensor of the FFN kept the published "
        "layouts would not fit. Assumed, for it is not published: one piece of a stage for each of its "
        "layers; the 800 B tokens of context extension spread evenly over 16k, 32k, 64k and 128k; 8,192 "
        "GPUs until 2.87 T tokens, 16,384 after; FlashAttention-2; a restart of 10 minutes. 8B and 70B: "
        "their layouts and numbers of GPUs are not published.",
    )


def rank_values(values: Values, index: int, row: published.MetaRow, machine: machines.Machine) -> None:
    """Where Meta's layout stands among all that fit, in the search's own order."""
    began = time.process_time()
    result = search(row.job, machine, recomputes=PLAIN_RECOMPUTES)
    spent = time.process_time() - began
    own = next(i for i, found in enumerate(result.found, 1) if found.layout == row.layout)
    shapes = result.by_shape()
    shape = next(i for i, found in enumerate(shapes, 1) if found.layout.shape == row.layout.shape)
    share, of_shapes = own / len(result.found), shape / len(shapes)
    behind = result.found[own - 1].seconds / result.best.seconds - 1
    print(
        f"      rank {own} of {len(result.found)} layouts that fit ({100 * share:.1f} %), {shape} of "
        f"{len(shapes)} TP × CP × PP × DP ({100 * of_shapes:.0f} %); {result.seen:,} seen in {spent:.2f} s; "
        f"the model's best: {result.best.layout}, {100 * result.best.mfu:.1f} %, {100 * behind:.1f} % faster"
    )
    values[f"MFU {index + 1} rank"] = (own, "of all that fit")
    values[f"MFU {index + 1} layouts that fit"] = (len(result.found), "layouts")
    values[f"MFU {index + 1} rank, share"] = Value(percent(share), "%", bar="≤ 10 %", passed=share <= 0.1)
    values[f"MFU {index + 1} rank among TP × CP × PP × DP"] = (shape, f"of {len(shapes)}")
    values[f"MFU {index + 1} rank among TP × CP × PP × DP, share"] = (percent(of_shapes), "%")
    values[f"MFU {index + 1} step, longer than the model's best"] = (percent(behind), "%")
    values[f"MFU {index + 1} search"] = Value(round(spent, 2), "s of CPU", bar="≤ 10 s", passed=spent <= 10)


def hours_405b() -> tuple[float, float]:
    """(GPU hours if nothing fails, FLOPs) of the published schedule."""
    config = SIZES["405B"]
    eight, sixteen = published.META[0].layout, published.META[1].layout
    phases = [  # tokens, GPUs, layout, context, sequences a step
        (252e6, 8_192, eight, 4_096, 1_024),
        (2.87e12 - 252e6, 8_192, eight, 8_192, 1_024),
        (TRAINING_TOKENS - 2.87e12 - 800e9, 16_384, sixteen, 8_192, 2_048),
    ]
    for cp in (2, 4, 8, 16):
        layout = replace(sixteen, cp=cp, dp=128 // cp)
        phases.append((800e9 / 4, 16_384, layout, 8_192 * cp, 2_048 // cp))
    hours = flops = 0.0
    for tokens, devices, layout, context, batch in phases:
        job = Job(config, batch, context)
        seconds = predict_step(job, layout, machines.find_machine(f"{devices}xH100")).seconds
        hours += tokens / job.tokens * seconds * devices / 3600
        flops += tokens / job.tokens * job.flops
    return hours, flops


def hours_values(values: Values) -> None:
    """GPU hours of the three sizes: predicted, implied rate, what is unexplained."""
    effective = simulated(RESTART)
    busy, flops = hours_405b()
    peak = machines.find_machine("H100").device.peak("bf16")
    rows = {"405B": (busy / effective, flops)}
    for name, devices in (("70B", 4_096), ("8B", 1_024)):
        config = SIZES[name]
        job, machine = (
            Job(config, default_batch(config, 8_192, devices), 8_192),
            machines.find_machine(f"{devices}xH100"),
        )
        good = young_daly(devices, state_nbytes(config)).effective
        steps = TRAINING_TOKENS / job.tokens
        rows[name] = (steps * search(job, machine).best.seconds * devices / 3600 / good, steps * job.flops)
    for name, (hours, flops) in rows.items():
        true = GPU_HOURS[name]
        error = hours / true - 1
        naive = flops / (GUESSED_MFU * peak) / 3600
        implied = flops / true / 3600 / 1e12
        print(
            f"  {name:5} {hours / 1e6:6.2f} M GPU hours, published {true / 1e6:.2f}, {100 * error:+.1f} %; a "
            f"constant {GUESSED_MFU:g}: {naive / 1e6:.2f}; implied {implied:.0f} TFLOP/s, unexplained factor "
            f"{true / hours:.2f}"
        )
        bar = within(error, 0.15) if name == "405B" else {}
        values[f"{name} GPU hours"] = (round(hours), "GPU hours")
        values[f"{name} GPU hours, published"] = (round(true), "GPU hours")
        values[f"{name} GPU hours, error"] = Value(percent(error), "%", **bar)
        values[f"{name} GPU hours of a constant {GUESSED_MFU:g}"] = (round(naive), "GPU hours")
        values[f"{name} implied rate"] = (round(implied, 1), "TFLOP/s a GPU")
        values[f"{name} unexplained factor"] = (round(true / hours, 3), "1")


def simulated(restart: float, seeds: int = 20) -> float:
    """Record the useful share of Meta's 54 days at the best checkpoint interval, a mean over histories."""
    good = young_daly(16_384, state_nbytes(SIZES["405B"]), restart=restart)
    shares = [
        simulate_run(
            published.DAYS, published.UNEXPECTED, published.PLANNED, interval=good.interval,
            checkpoint_seconds=good.checkpoint_seconds, restart=restart, seed=seed,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    return statistics.fmean(shares)


def failures_receipt() -> None:
    """54 days on 16,384 GPUs, by restart time."""
    good = young_daly(16_384, state_nbytes(SIZES["405B"]))
    values: Values = {
        "checkpoint interval": (round(good.interval, 1), "s"),
        "time between failures": (round(good.between_failures), "s"),
        "Young–Daly": (percent(good.effective), "%"),
    }
    print(f"\n{published.DAYS} days, {published.UNEXPECTED} + {published.PLANNED} interruptions, 16,384 GPUs")
    for minutes in (2, 5, 10, 15, 20, 30):
        share = simulated(60 * minutes)
        print(f"  restart {minutes:2} min: {100 * share:.1f} % of the time counts")
        bar: dict[str, Any] = (
            {"bar": "90 to 97 %", "passed": 0.9 <= share <= 0.97} if 60 * minutes == RESTART else {}
        )
        values[f"restart {minutes} min"] = Value(percent(share), "%", **bar)
    save_receipt(
        "plan-failures",
        what="simulated share of 54 days on 16,384 GPUs that is training, by the time a restart takes",
        values=values,
        seed=0,
        notes="Mean of 20 histories. The paper says more than 90 % and gives no restart time.",
    )


def titan_tuning(row: published.TitanRow, values: Mapping[str, float]) -> Tuning:
    """``power`` is what 500 W instead of 700 costs, and ``eager`` means pointwise operators one by one."""
    slow = values["power"] if "500W" in row.machine else 1.0
    return replace(
        HARDWARE,
        gemm=values["gemm"] * slow,
        attention=values["attention"] * slow,
        pointwise=values["pointwise"] * (1.0 if row.compiled else values["eager"]),
        exposed_tp=values["exposed_tp"],
    )


_MACHINES = {
    row.machine: machines.find_machine(row.machine) for row in (*published.TITAN, *published.GPT_FAST)
}
TITAN_START = {
    "gemm": 1.0,
    "power": 1.15,
    "pointwise": 1.0,
    "eager": 2.0,
    "attention": 1.0,
    "exposed_tp": 1.0,
}


def titan(row: published.TitanRow, values: Mapping[str, float]) -> float:
    """Tokens a second and GPU."""
    machine = _MACHINES[row.machine]
    seconds = step_time(row.job, row.layout, machine, titan_tuning(row, values)).seconds
    return row.job.tokens / machine.count / seconds


FAST_START = {"bf16": 0.83, "int8": 0.83, "int4": 0.83, "op_seconds": 4e-6, "latency": 5e-6, "amd": 1.0}
FAST_LIMITS = dict.fromkeys(("bf16", "int8", "int4"), (0.1, 1.0))


def fast(row: published.FastRow, values: Mapping[str, float]) -> float:
    """Return tokens per second from shares of the memory's speed, seconds per operator and per reduction."""
    machine = _MACHINES[row.machine]
    share = values[{2.0: "bf16", 1.0: "int8"}.get(row.weights.linears, "int4")]
    share *= 1.0 if "A100" in row.machine else values["amd"]
    efficiency = replace(
        machine.device.efficiency, memory=EfficiencyCurve.flat(share), op_seconds=values["op_seconds"]
    )
    tuned = replace(
        machine,
        device=replace(machine.device, efficiency=efficiency),
        link=replace(machine.link, latency=values["latency"]),
    )
    return 1 / decode_seconds(row.config, tuned, row.weights, context=row.context, tp=row.tp)


def fitted_receipt(
    name: str,
    what: str,
    rows: Sequence[Any],
    model: Callable[[Any, Mapping[str, float]], float],
    start: Mapping[str, float],
    plain: Mapping[str, float],
    limits: Mapping[str, tuple[float, float]] | None,
    family: Callable[[Any], str],
    unit: str,
) -> None:
    """Every row with the factors of the other half, of the other families, and with none."""

    def measured(row: Any) -> float:
        return row.tokens_per_s

    errors, fits = cross_fit(rows, measured, model, start, limits)
    hard = {
        kind: fit_factors([row for row in rows if family(row) != kind], measured, model, start, limits)
        for kind in {family(row) for row in rows}
    }
    values: Values = {}
    apart = []
    heads = ("row", "measured", "predicted", "error %", "other families %", "unfitted %")
    print("\n{}\n  {:32} {:>9} {:>9} {:>8} {:>17} {:>11}".format(what, *heads))
    for row, error in zip(rows, errors, strict=True):
        far, none = model(row, hard[family(row)]) / measured(row) - 1, model(row, plain) / measured(row) - 1
        apart.append(abs(far))
        found = measured(row) * (1 + error)
        shares = f"{100 * error:+8.1f} {100 * far:+17.1f} {100 * none:+11.1f}"
        print(f"  {row.name:32} {measured(row):9,.1f} {found:9,.1f} {shares}")
        values[f"{row.name}: measured"] = (measured(row), unit)
        values[f"{row.name}: predicted"] = (round(found, 1), unit)
        values[f"{row.name}: error"] = (percent(error), "%")
    halves = [statistics.median(map(abs, errors[half::2])) for half in (0, 1)]
    for half, word in enumerate(("first", "second")):
        median = halves[half]
        values[f"median error, {word} half, fitted on the other"] = Value(
            percent(median), "%", **within(median, 0.15)
        )
    values["worst error"] = (percent(max(map(abs, errors))), "%")
    values["median error, fitted on the other families"] = (percent(statistics.median(apart)), "%")
    unfitted = statistics.median(abs(model(row, plain) / measured(row) - 1) for row in rows)
    values["median error, nothing fitted"] = (percent(unfitted), "%")
    for which, factors in zip(("first", "second"), reversed(fits), strict=True):
        for key, factor in factors.items():
            values[f"factor {key}, for the {which} half"] = (
                float(f"{factor:.4g}"),
                "1" if factor > 1e-3 else "s",
            )
    print(
        f"  median {100 * halves[0]:.1f} and {100 * halves[1]:.1f} % on the half not fitted, worst "
        f"{100 * max(map(abs, errors)):.1f} %; other families {100 * statistics.median(apart):.1f} %; "
        f"unfitted {100 * unfitted:.1f} %"
    )
    save_receipt(name, what=what, values=values)


def main() -> None:
    """Write all receipts."""
    bench_parser(__doc__).parse_args()
    sizes_receipt()
    meta_receipt()
    failures_receipt()
    fitted_receipt(
        "plan-torchtitan",
        "torchtitan's published runs: tokens per second and GPU",
        published.TITAN,
        titan,
        TITAN_START,
        dict.fromkeys(TITAN_START, 1.0),
        None,
        lambda row: row.size if "H200" not in row.machine else "H200",
        "tokens/s per GPU",
    )
    fitted_receipt(
        "plan-gptfast",
        "gpt-fast's published decode rates: tokens per second of one sequence",
        published.GPT_FAST,
        fast,
        FAST_START,
        FAST_START,
        FAST_LIMITS,
        lambda row: row.name.split(" bf16")[0].split(" int")[0],
        "tokens/s",
    )


if __name__ == "__main__":
    main()
