"""Compare Herd with llama.cpp on the same blocks of a whole model of 8B shape, alternately.

    make rivals                                    # llama-cpp-python from its source, in .venv-rivals
    python bench/speed_llamacpp.py q4              # then q8, q6k, Q4_K_M …: decode at 128 and prefill of 512
    python bench/speed_llamacpp.py q5k --size 1B   # other formats, 1B shape
    python bench/speed_llamacpp.py q4 --batch 16   # sixteen sequences at once
    python bench/speed_llamacpp.py q4 --layers 4 --context 32768 --kv int8     # attention: 32k tokens, 4 layers
    ... --rounds 5 --steps 8 --layers 32           # at most five minutes on two cores, one receipt each

Weights are random and seeded. llama.cpp reads the same blocks from a GGUF file (without a vocabulary, which
decoding ids does not need), which stays in --work for the next time. A turn is a prefill, or the median of
some decode steps. A ratio is the median of the rounds' ratios, so it is not exactly the ratio of the printed
medians. The speed of the memory is measured in the same rounds. Herd samples greedily and goes through its
engine, while llama.cpp only decodes, as in its own llama-bench. A prompt of 32k tokens would take llama.cpp an
hour, so it reads the prompt in chunks that attend only to themselves. Herd reads it whole. The measured steps read the
same amount in both.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import psutil
import torch

from common import WORK, at_least, bench_parser, save_receipt
from herd.checkpoint import write_random
from herd.evals.rival import LlamaCpp, find_python
from herd.evals.speed import Work, longest_sequence, measure_speed, overhead_seconds
from herd.kernels.bandwidth import MemoryReader
from herd.llama.config import SIZES, ModelConfig
from herd.quant import Scheme
from herd.quant.mixtures import named_scheme
from herd.quant.random import random_quantized
from herd.report.receipt import Value

SEED = 0


def file_of(work: Path, size: str, plan: Scheme, config: ModelConfig) -> Path:
    """The file of these weights, written if it is not there."""
    path = work / f"{size}-{plan.label}-{config.n_layers}-seed{SEED}.gguf"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", file=sys.stderr)
        write_random(path, config, plan, SEED)
    return path


def verdicts(record: dict, wide_registers: bool, batched: bool, long: bool) -> dict[str, Value]:
    """A record as values of a receipt, with the bars of the project's table."""
    name, rival = record["name"], record["rival"]
    low, high = rival["ratio_quartiles"]
    values = {f"{name}: herd": Value(record["tokens_per_second"], "tokens/s")}
    values[f"{name}: llama.cpp"] = Value(rival["tokens_per_second"], "tokens/s")
    ratio = functools.partial(Value, rival["ratio"], "×", lo=low, hi=high)
    if record["work"] == "prefill":
        least = 2.0 if wide_registers else 1.5
        plain = batched or long
        values[f"{name}: ratio"] = (
            ratio() if plain else ratio(bar=f"≥ {least}", passed=rival["ratio"] >= least)
        )
        return values | {f"{name}: herd, arithmetic": Value(record["gops"], "GOP/s")}
    if batched:
        least = 2.2 if wide_registers else 1.5
        values[f"{name}: ratio"] = ratio(bar=f"≥ {least}", passed=rival["ratio"] >= least)
        values[f"{name}: herd, arithmetic"] = Value(record["gops"], "GOP/s")
    elif long:
        share = record["share_of_bandwidth"]
        values[f"{name}: ratio"] = ratio(bar="≥ 1.5", passed=rival["ratio"] >= 1.5)
        values[f"{name}: share of read bandwidth"] = at_least(0.7, share, "1")
    else:
        # Either is enough: a good rival leaves less to gain where the memory is the limit.
        room = record["read_bandwidth"] / rival["bytes_per_second"]
        share = record["share_of_bandwidth"]
        passed = rival["ratio"] >= 1.2 or share >= 0.9
        values["read bandwidth over what llama.cpp draws"] = Value(room, "×")
        values[f"{name}: ratio"] = ratio(bar="≥ 1.2, or 0.9 of read bandwidth", passed=passed)
        values[f"{name}: share of read bandwidth"] = Value(share, "1")
    values[f"{name}: bytes read per step"] = Value(record["nbytes"], "bytes")
    values[f"{name}: herd, memory"] = Value(record["bytes_per_second"] / 1e9, "GB/s")
    values[f"{name}: llama.cpp, memory"] = Value(rival["bytes_per_second"] / 1e9, "GB/s")
    values["read bandwidth"] = Value(record["read_bandwidth"] / 1e9, "GB/s")
    return values


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("quant", help="q4, q8, q6k, Q4_K_M … any type of `herd quantize --to`")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", default="8B", choices=list(SIZES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument(
        "--kv", choices=["auto", "bf16", "int8"], default="auto", help="int8: llama.cpp's is q8_0 then"
    )
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    find_python()
    config = SIZES[args.size]
    config = config.replace(n_layers=args.layers or config.n_layers)
    plan, threads = named_scheme(args.quant, config), torch.get_num_threads()
    file = file_of(args.work, args.size, plan, config)
    model = random_quantized(config, plan, SEED)
    batched, long = args.batch > 1, args.context > 8192
    works = [Work("decode", args.context, args.batch), Work("prefill", args.prompt)]
    reader = MemoryReader()
    longest = longest_sequence(works, args.rounds, args.steps)

    def shown(name, done, total):
        return print(f"\r{name}: {done} of {total}  ", end="", file=sys.stderr, flush=True)

    theirs = "q8_0" if args.kv == "int8" else "f16"
    with LlamaCpp(file, threads=threads, context=longest, batch=args.batch, cache=theirs) as rival:
        records = measure_speed(
            model,
            works,
            rounds=args.rounds,
            steps=args.steps,
            bandwidth=reader.measure,
            rival=rival,
            progress=shown,
            kv=args.kv,
            seed=SEED,
        )
        version, rival_nbytes = rival.version, rival.resident_nbytes()
    resident = psutil.Process().memory_info().rss - reader.words.nbytes
    values: dict[str, Value] = {}
    for record in records:
        values |= verdicts(record, torch.backends.cpu.get_cpu_capability() == "AVX512", batched, long)
    decode, prefill = records
    if batched:
        share = decode["gops"] / prefill["gops"]
        values["decode's arithmetic over prefill's"] = at_least(0.7, share, "1")
    between = overhead_seconds(config, plan, model.dtype, args.batch) / decode["seconds"]
    values["between kernels, at most"] = Value(
        between, "1", bar=None if batched else "≤ 0.05", passed=None if batched else between <= 0.05
    )
    values |= {"memory, herd": Value(resident, "bytes"), "memory, llama.cpp": Value(rival_nbytes, "bytes")}
    parts = ["speed", *([args.size.lower()] if args.size != "8B" else [])]
    parts.append(plan.label.replace("_", ""))
    parts += [*([f"batch{args.batch}"] if batched else []), *(["long"] if long else [])]
    whole = "whole model" if config.n_layers == SIZES[args.size].n_layers else f"{config.n_layers} layers"
    save_receipt(
        "-".join(parts),
        what=f"{args.size} shape, {whole}, {plan.label.upper()}: Herd and llama.cpp in turns on the same "
        "blocks",
        values=values,
        seed=SEED,
        rivals={"llama-cpp-python": version},
        notes=f"{threads} threads; medians of {args.rounds} rounds, ratios of paired rounds with their "
        f"quartiles; Herd's cache is {decode['kv']}, llama.cpp's {theirs}; head {plan.head.name}, embedding "
        f"{plan.embeddings.name}; the GGUF file has no vocabulary",
    )


if __name__ == "__main__":
    main()
