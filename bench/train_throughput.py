"""Compare training speed and memory with `transformers` + fused AdamW on the CPU, alternating in one run.

    python bench/train_throughput.py       # about 12 minutes on two cores; --resume skips the choice of settings

The model: D 512, F 1408, 8 layers, 8 query and 4 KV heads, untied, vocabulary of 32,000. A step is 8 x 512 tokens:
forward, backward, clipping at norm 1 and an AdamW update, with fp32 weights and moments on both sides.

First each side chooses its settings, every candidate in its own process: `LlamaForCausalLM` (SDPA attention)
eager and under torch.compile with several settings, in fp32 and bf16 autocast; Herd in fp32 and bf16. The
fastest of each side is kept, with all that are within 5 % of it, because three steps cannot distinguish them.
Then the finalists alternate, one step each, all in memory, so that other work on the machine slows all of
them alike. The best median of a side counts. The receipt has medians, ratios of paired turns with their
quartiles, and the peak memory of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from importlib.metadata import version

from common import WORK, at_least, at_most, bench_parser, save_receipt
from contestant import Contestant, answer_steps
from herd.files import write_atomically

SHAPE = {"vocab_size": 32_000, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 1408}
ROWS, CONTEXT, SEED = 8, 512, 0
TOKENS = ROWS * CONTEXT

RIVALS = {
    "eager fp32": "transformers fp32",
    "eager bf16": "transformers bf16",
    "compiled fp32": "transformers fp32 compile",
    "compiled fp32, max-autotune": "transformers fp32 compile autotune",
    "compiled fp32, optimizer too": "transformers fp32 compile optimizer",
    "compiled bf16": "transformers bf16 compile",
}
OURS = {"herd fp32": "herd fp32", "herd bf16": "herd bf16"}
STATE = WORK / "train_throughput.json"


# One contestant, in its own process -------------------------------------------------------------------------


def transformers_step(words: list[str]):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["dim"],
        intermediate_size=SHAPE["ffn_dim"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=SHAPE["n_kv_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    optimizer = adamw(model)

    def loss(tokens, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in words):
            return model(input_ids=tokens, labels=tokens).loss

    update = optimizer.step
    if "compile" in words:
        loss = torch.compile(loss, mode="max-autotune-no-cudagraphs" if "autotune" in words else None)
    if "optimizer" in words:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
        )
        update = torch.compile(optimizer.step)
    return stepper(model, loss, optimizer, update)


def herd_step(words: list[str]):
    import torch

    from herd import machine
    from herd.kernels import build
    from herd.kernels.loss import linear_cross_entropy
    from herd.llama.config import ModelConfig
    from herd.llama.model import LlamaLM
    from herd.train import AdamW

    machine.keep_freed_memory()
    build.ready()
    model = LlamaLM(ModelConfig(**SHAPE)).init_weights(SEED)
    optimizer = AdamW(lr=3e-4, weight_decay=0.1).build(model)

    def loss(tokens, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in words):
            total = linear_cross_entropy(model(tokens).flatten(0, 1), model.lm_head.weight, targets.flatten())
            return total / (ROWS * (CONTEXT - 1))

    return stepper(model, loss, optimizer, optimizer.step)


def adamw(model):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def stepper(model, loss, optimizer, update):
    import torch

    tokens = torch.randint(
        SHAPE["vocab_size"], (ROWS, CONTEXT), generator=torch.Generator().manual_seed(SEED)
    )
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]

    def step() -> float:
        total = loss(tokens, targets)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update()
        optimizer.zero_grad(set_to_none=True)
        return float(total.detach())

    return step


def contestant(words: list[str], threads: int) -> None:
    """Answer as the contestant that ``words`` name."""
    answer_steps(lambda: herd_step(words) if words[0] == "herd" else transformers_step(words), threads, SEED)


# The match --------------------------------------------------------------------------------------------------


def start(words: str, threads: int) -> Contestant:
    environment = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_MAX_AUTOTUNE_REPORT": "0"}
    return Contestant.of_this_script(words, threads, quiet=True, environment=environment)


def tournament(candidates: dict[str, str], threads: int, tokens: int = TOKENS) -> dict[str, dict[str, float]]:
    """Return the best of three steps after two to warm up. A hopelessly slow candidate gets no more."""
    results: dict[str, dict[str, float]] = {}
    for name, words in candidates.items():
        process, best = (
            start(words, threads),
            min((r["seconds"] for r in results.values()), default=float("inf")),
        )
        try:
            steps = [process.ask(), process.ask()]
            if steps[-1]["seconds"] < 2 * best:
                steps = [process.ask() for _ in range(3)]
            results[name] = {"seconds": min(s["seconds"] for s in steps), "peak": steps[-1]["peak"]}
            print(
                f"{name}: {tokens / results[name]['seconds']:.0f} tokens/s, "
                f"{results[name]['peak'] / 1e9:.2f} GB"
            )
        except RuntimeError as error:
            print(f"{name}: {error}")
        finally:
            process.close()
    return results


def match(names: dict[str, str], rounds: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Let all candidates, all resident, take one step each in turns."""
    processes = {name: start(words, threads) for name, words in names.items()}
    record: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "peak": [], "loss": []} for name in names
    }
    for turn in range(-2, rounds):
        for name, process in processes.items():
            step = process.ask()
            if turn >= 0:
                for key, values in record[name].items():
                    values.append(step[key])
        if turn >= 0:
            print(turn, {name: round(r["seconds"][-1], 2) for name, r in record.items()}, flush=True)
    for process in processes.values():
        process.close()
    return record


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--resume", action="store_true", help="keep the choice of settings of the last run")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.contestant.split(), arguments.threads)
        return
    if arguments.resume and STATE.exists():
        field = json.loads(STATE.read_text())
    else:
        field = tournament(RIVALS, arguments.threads) | tournament(OURS, arguments.threads)
        write_atomically(STATE, json.dumps(field))
    finalists = [name for side in SIDES for name in close_to_best(field, side)]
    record = match({name: (RIVALS | OURS)[name] for name in finalists}, arguments.rounds, arguments.threads)
    pace = {name: statistics.median(r["seconds"]) for name, r in record.items()}
    best = {side: min((n for n in pace if n.startswith(side)), key=pace.__getitem__) for side in SIDES}
    report(field, best, record, arguments.threads)


def close_to_best(field: dict[str, dict[str, float]], side: str) -> list[str]:
    """Return a side's fastest candidate and those within 5 % of it."""
    seconds = {name: result["seconds"] for name, result in field.items() if name.startswith(side)}
    return [name for name, took in seconds.items() if took <= 1.05 * min(seconds.values())]


SIDES = ("eager", "compiled", "herd")
BARS = {"eager": (1.8, 0.6), "compiled": (1.15, 0.9)}


def report(field, best, record, threads: int) -> None:
    from herd.report.receipt import Value

    ours = record[best["herd"]]
    values = {}
    for side in SIDES:
        mine = record[best[side]]
        paces = [TOKENS / s for s in mine["seconds"]]
        low, middle, high = statistics.quantiles(paces, n=4)
        values[f"{side}_pace"] = Value(middle, "tokens/s", low, high)
        values[f"{side}_peak"] = Value(max(mine["peak"]), "bytes")
        values[f"{side}_settings"] = Value(best[side], "name")
    for side, (pace_bar, memory_bar) in BARS.items():
        theirs = record[best[side]]
        ratios = [a / b for a, b in zip(theirs["seconds"], ours["seconds"], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        memory = max(ours["peak"]) / max(theirs["peak"])
        values[f"pace_vs_{side}"] = at_least(pace_bar, ratio, "ratio", low, high)
        values[f"peak_vs_{side}"] = at_most(memory_bar, memory, "ratio")
    tried = ", ".join(
        f"{name} {TOKENS / r['seconds']:.0f} tokens/s {r['peak'] / 1e9:.2f} GB" for name, r in field.items()
    )
    save_receipt(
        "train-throughput",
        what=f"Training steps of {ROWS} x {CONTEXT} tokens, D 512, F 1408, 8 layers, 32,000 words, "
        f"{threads} threads, alternated with transformers + fused AdamW; peak is the whole process's "
        "largest resident set",
        values=values,
        seed=SEED,
        rivals={"transformers": version("transformers"), "torch": version("torch")},
        notes=f"Settings tried (best of three steps): {tried}.",
    )


if __name__ == "__main__":
    main()
