"""Answer requests for three adapters of one SmolLM2-135M in one batch, and compare with the base alone.

    HERD_TEST_DATA=../shared/data python bench/serve_adapters.py       # about 4 minutes on two cores

Twelve requests of 48 prompt tokens and 64 new ones, each for one of three adapters of rank 16 on all linear
layers. In fp32 the greedy answers must be those of the models with the adapter merged. In fp32, bf16 and Q4_1
the turns with adapters alternate with turns of the base without any.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from common import DATA, bench_parser, save_receipt
from herd import checkpoint
from herd.engine import Engine, Request, Sampling
from herd.llama.switched import switch_adapters
from herd.report.receipt import Value
from tune_speed import ALPHA, BASE, FILE, RANK, SEED, base_folder

N_ADAPTERS, N_REQUESTS, N_NEW = 3, 12, 64


def measure(args: argparse.Namespace) -> None:
    base_folder()
    tokenizer = checkpoint.load_tokenizer(str(FILE))
    assert tokenizer is not None
    text = next((DATA / "wikitext2").rglob("*test*")).read_text(encoding="utf-8")
    ids = tokenizer.encode(text[:40_000])
    prompts = [ids[64 * number : 64 * number + 48] for number in range(N_REQUESTS)]
    names = [f"adapter{number % N_ADAPTERS}" for number in range(N_REQUESTS)]
    sampling = Sampling(max_tokens=N_NEW)
    values: dict[str, Value] = {}
    for kind, bar in (("fp32", True), ("bf16", True), ("q4_1", False)):
        base = _base(kind)
        updates = {f"adapter{number}": _update(base, number) for number in range(N_ADAPTERS)}
        switched = _base(kind)
        switch_adapters(switched, updates)
        alone = [Request(prompt, sampling) for prompt in prompts]
        adapted = [Request(p, sampling, adapter=name) for p, name in zip(prompts, names, strict=True)]
        if kind == "fp32":
            values["equal"] = _equal_answers(base, switched, updates, prompts, names, sampling)
        paces: dict[str, list[float]] = {"base": [], "adapters": []}
        for turn in range(-1, args.rounds):
            for side, model, requests in (("base", base, alone), ("adapters", switched, adapted)):
                pace = _pace(model, requests)
                if turn >= 0:
                    paces[side].append(pace)
        for side, each in paces.items():
            low, middle, high = statistics.quantiles(each, n=4)
            values[f"{kind}_{side}"] = Value(middle, "tokens/s", low, high)
        ratios = [b / a for a, b in zip(paces["base"], paces["adapters"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        shown = (">= 0.8", middle >= 0.8) if bar else (None, None)
        values[f"{kind}_ratio"] = Value(middle, "of the base's tokens/s", low, high, *shown)
        print(kind, {side: round(statistics.median(each)) for side, each in paces.items()}, flush=True)
    save_receipt(
        "tune-adapters", values=values, seed=SEED,
        what=f"{N_REQUESTS} requests for {N_ADAPTERS} adapters of rank {RANK} on one SmolLM2-135M in one batch: greedy "
        f"answers of {N_NEW} tokens, and tokens per second beside the base alone",
        notes="adapters on all linear layers with random B; prompts of 48 tokens of an encyclopedia",
    )  # fmt: skip


def _base(kind: str) -> Any:
    if kind == "q4_1":
        return checkpoint.load_model(str(FILE))
    return checkpoint.load_model(str(BASE), dtype=torch.float32 if kind == "fp32" else torch.bfloat16)


def _update(model: Any, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Return a random adapter on all linear layers that changes the answers."""
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            a_RD = torch.randn(RANK, layer.in_features, generator=generator) * layer.in_features**-0.5
            b_OR = torch.randn(layer.out_features, RANK, generator=generator) * 0.02
            update[name] = a_RD, b_OR, ALPHA / RANK
    return update


def _equal_answers(
    base: Any, switched: Any, updates: Any, prompts: list[list[int]], names: list[str], sampling: Any
) -> Value:
    """Return the number of answers that are those of the model with the adapter merged, from the engine alone."""
    requests = [Request(p, sampling, adapter=name) for p, name in zip(prompts, names, strict=True)]
    together = [done.ids for done in Engine(switched, None).run(requests)]
    equal = 0
    for name, update in updates.items():
        weights = {layer: base.get_parameter(f"{layer}.weight") for layer in update}
        before = {layer: weight.detach().clone() for layer, weight in weights.items()}
        with torch.no_grad():
            for layer, (a_RD, b_OR, scale) in update.items():
                weights[layer] += scale * (b_OR @ a_RD)
        members = [number for number, other in enumerate(names) if other == name]
        found = Engine(base, None).run([Request(prompts[number], sampling) for number in members])
        equal += sum(done.ids == together[number] for done, number in zip(found, members, strict=True))
        with torch.no_grad():
            for layer, weight in before.items():
                weights[layer].copy_(weight)
    passed = equal == len(prompts)
    return Value(equal, f"of {len(prompts)} answers, fp32", bar=f"{len(prompts)}", passed=passed)


def _pace(model: Any, requests: list[Any]) -> float:
    engine = Engine(model, None)
    began = time.perf_counter()
    answers = engine.run(requests)
    return sum(len(answer.ids) for answer in answers) / (time.perf_counter() - began)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
