"""Measure memory and time of converting an 8B folder, and the work that a kill loses.

    python bench/conversion.py            # a few minutes on two cores, needs 30 GB of disk in --work until it ends

A folder of the 8B shape in bf16 (16 GB, seeded random weights, four shards) is made. Then, each in a process
of its own, it is quantized to Q4_0, exported as GGUF in F16 and exported for vLLM, and the Q4_0 folder is
loaded twice: the first load also compares the file with its hash, which is remembered for the second
(`checkpoint/verified.py`). Peak memory is the kernel's count for the process, including mapped file pages.
The quantization is also killed once with kill -9 and resumed. Finished steps are kept in --work, so the same
command continues after an interruption.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import WORK, at_most, bench_parser, save_receipt
from herd import checkpoint
from herd.llama.config import SIZES
from herd.quant import scheme
from herd.quant.formats import BF16, F32
from herd.quant.random import random_rows_of
from herd.report.receipt import Value

SEED = 0
LIMIT = 3 << 30
SCRIPT = """
import json, psutil, resource, sys, time
from herd import checkpoint
from herd.quant import scheme
from herd.kernels import build
build.ready()
before = psutil.Process().memory_info().rss
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": seconds, "peak": peak, "before": before}}))
"""
LOAD = "model = checkpoint.load_model(sys.argv[1])"
CALLS = {
    "quantize to Q4_0": (
        "q4",
        'checkpoint.quantize_folder(checkpoint.ImportSource(sys.argv[1]), sys.argv[2], scheme("q4"))',
    ),
    "export as GGUF in F16": ("f16.gguf", 'checkpoint.export_gguf(*sys.argv[1:], "f16")'),
    "export for vLLM": ("vllm", "checkpoint.export_vllm(*sys.argv[1:])"),
}


def make(folder: Path, size: str) -> None:
    """Write the folder of plain weights, one tensor at a time."""
    config = SIZES[size]
    formats = {name: BF16 if len(shape) > 1 else F32 for name, shape in config.param_shapes()}
    rows_of, shapes = random_rows_of(config, formats, SEED), dict(config.param_shapes())

    def get(name: str) -> torch.Tensor:
        return (
            rows_of(name).view(torch.bfloat16 if len(shapes[name]) > 1 else torch.float32).view(shapes[name])
        )

    lineage = checkpoint.Lineage(name=f"random-{size}", stage="test")
    checkpoint.write_checkpoint(folder, config, get, dtype=torch.bfloat16, lineage=lineage)


def run(body: str, *args: Path) -> dict[str, float]:
    """Run the code in a process of its own and return its time and peak memory."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(body=body), *map(str, args)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout)


def killed(body: str, source: Path, out: Path) -> dict[str, float]:
    """Kill the work with kill -9 once a third is written, then resume it and count the tensors kept."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(body=body), str(source), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total = len(list(checkpoint.load_config(source).param_shapes()))
    journal = out.with_name(f".{out.name}.part") / "journal.json"
    while not journal.exists() or json.loads(journal.read_text())["done"] < total // 3:
        if process.poll() is not None:
            sys.exit("it ended before it could be killed")
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = json.loads(journal.read_text())["done"]
    return run(body, source, out) | {"kept": kept, "tensors": total}


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--size", default="8B", choices=list(SIZES))
    parser.add_argument("--work", type=Path, default=WORK / "conversion")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    state_file = args.work / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    source = args.work / "bf16"
    if not source.exists():
        print(f"making {source}", file=sys.stderr)
        make(source, args.size)

    def step(name: str, work) -> None:
        if name not in state:
            print(name, file=sys.stderr)
            state[name] = work()
            state_file.write_text(json.dumps(state))

    for name, (out, body) in CALLS.items():
        target = args.work / out
        step(name, lambda body=body, target=target: run(body, source, target))
        if name.startswith("quantize"):
            step("first load", lambda target=target: run(LOAD, target))
            step("load", lambda target=target: run(LOAD, target))
            whole = target / "model.gguf"
            again = args.work / "q4-killed"
            step("killed", lambda body=body, again=again: killed(body, source, again))
            if again.exists():
                state["same"] = subprocess.run(["cmp", str(whole), str(again / "model.gguf")]).returncode == 0
                shutil.rmtree(again)
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
    config = SIZES[args.size]
    values: dict[str, Value] = {}
    for name in CALLS:
        found = state[name]
        values[f"{name}: peak memory"] = at_most(LIMIT, found["peak"], "bytes", shown="≤ 3 GiB")
        values[f"{name}: time"] = Value(found["seconds"], "s")
        values[f"{name}: pace"] = Value(config.nbytes(2.0) / found["seconds"] / 1e9, "GB/s of bf16")
    load = state["load"]
    values["load of the Q4_0 folder: time"] = Value(
        load["seconds"], "s", bar="< 5", passed=load["seconds"] < 5
    )
    values["first load, which hashes the file: time"] = Value(state["first load"]["seconds"], "s")
    copies = (load["peak"] - load["before"]) / scheme("q4").nbytes(config)
    values["load of the Q4_0 folder: memory over its weights"] = at_most(1.1, copies, "×")
    resumed = state["killed"]
    values["killed and resumed: tensors kept"] = Value(resumed["kept"], f"of {resumed['tensors']}")
    values["killed and resumed: time of the rest"] = Value(resumed["seconds"], "s")
    values["killed and resumed: same bytes"] = Value(state["same"], "1", bar="= 1", passed=state["same"])
    save_receipt(
        "conversion",
        what=f"Conversions of an {args.size} folder in bf16 ({config.nbytes(2.0) / 1e9:.1f} GB) stream",
        values=values,
        seed=SEED,
        notes="random weights; each conversion in a process of its own, peak resident memory as the kernel "
        "counts it, mapped file pages included; the load reads from a warm page cache, knows the hash and "
        "repacks; its memory is what it takes at most on top of a process that has torch and the kernels",
    )
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
