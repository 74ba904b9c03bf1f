"""Measure the error and the speed of products with quantized weights (receipts kernel-accuracy and qmatmul).

    python bench/qmatmul.py [--rounds 7]

Decoding (1 and 8 tokens) reads every weight once, so its speed is given in bytes of blocks per second and
compared, alternately, with a loop that only reads memory. The speed of prefill (512 tokens) is given in
operations per second. A multiply-add is two. The matrices are random and have the shapes of an 8B model.
Together they are too large for any cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from common import at_most, bench_parser, save_receipt
from herd.errors import QuantError
from herd.kernels.bandwidth import MemoryReader
from herd.kernels.qmatmul import here, interleave, path, qmatmul, round_activations
from herd.quant import FORMATS, Format, blocks
from herd.quant.random import random_rows
from herd.report.receipt import Value

SEED = 0
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""(outputs, inputs): attention's, and the feed-forward's up and down."""
SET_BYTES = 256 << 20
"""Of all matrices of a set: each is read once before the first is read again."""
PROMPT = 512


def seconds(work: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def accuracy(
    format: Format, name: str, D: int = 4096, R: int = 512, N: int = 64
) -> dict[str, tuple[float, str]]:
    """Return errors relative to the result: of the kernel on its own codes, and of rounding activations."""
    rows_RB = random_rows((R, D), format, SEED)
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(SEED))
    codes, scales = round_activations(x_ND)
    rounded_ND = (codes.double().unflatten(-1, (-1, 32)) * scales.double()[..., None]).flatten(-2)
    weight_RD = blocks.decode(rows_RB, format, torch.float64)
    truth_NR, float_NR = rounded_ND @ weight_RD.T, x_ND.double() @ weight_RD.T
    y_NR = qmatmul(x_ND, interleave(rows_RB, format.code), format.code, name).double()
    return {
        f"{format}.{name}.vs_float64": (((y_NR - truth_NR).norm() / truth_NR.norm()).item(), "1"),
        f"{format}.{name}.vs_float_activations": (((y_NR - float_NR).norm() / float_NR.norm()).item(), "1"),
    }


def speed(format: Format, R: int, D: int, rounds: int, reader: MemoryReader, name: str) -> dict[str, Value]:
    """Return GB/s and bandwidth shares of 1 and 8 tokens, and GOP/s of prefill, with their extremes."""
    rows_RB = random_rows((R, D), format, SEED)
    tiles = [interleave(rows_RB, format.code) for _ in range(1 + SET_BYTES // rows_RB.nbytes)]
    x_PD = torch.randn(PROMPT, D)
    records: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):
        read = reader.measure(0.02)
        for N in (1, 8):
            took = seconds(lambda n=N: [qmatmul(x_PD[:n], tile, format.code, name) for tile in tiles])  # type: ignore
            pace = sum(tile.nbytes for tile in tiles) / took
            _note(records, round_, {f"tokens{N}": pace / 1e9, f"tokens{N}.share_of_read": pace / read})
        took = (
            seconds(lambda: qmatmul(x_PD, next(cycle), format.code, name))
            if (cycle := itertools.cycle(tiles))
            else 0
        )
        _note(records, round_, {"prompt512": 2 * PROMPT * R * D / took / 1e9, "read": read / 1e9})
    units = {"prompt512": "GOP/s", "tokens1.share_of_read": "1", "tokens8.share_of_read": "1"}
    return {
        f"{format}.{R}x{D}.{key}": Value(statistics.median(v), units.get(key, "GB/s"), lo=min(v), hi=max(v))
        for key, v in records.items()
    }


def _note(records: dict[str, list[float]], round_: int, values: dict[str, float]) -> None:
    if round_:  # the first does not count
        for key, value in values.items():
            records.setdefault(key, []).append(value)


def main() -> None:
    """Measure, print, write both receipts."""
    parser = bench_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    name = path()
    if name is None:
        raise QuantError("no native kernels here: nothing to measure")
    errors: dict[str, tuple[float, str]] = {}
    for format, isa in itertools.product(FORMATS.values(), here()):
        errors |= accuracy(format, isa)
    worst = max(value for key, (value, _) in errors.items() if key.endswith("vs_float64"))
    values: dict[str, Value | tuple[float, str]] = {**errors}
    values["worst_vs_float64"] = at_most(1e-5, worst, "1", shown="≤ 1e-5")
    what = "quantized matmul: error relative to the result, against float64 on the same codes and on float activations"
    save_receipt("kernel-accuracy", what=what, values=values, seed=SEED)
    reader, speeds = MemoryReader(), dict[str, Value]()
    for format, (R, D) in itertools.product(FORMATS.values(), SHAPES):
        speeds |= (new := speed(format, R, D, args.rounds, reader, name))
        print("  ".join(f"{key} {value.value:.3g}" for key, value in new.items()), flush=True)
    what = (
        f"quantized matmul, {name}, {torch.get_num_threads()} threads: "
        "decode and prefill, alternated with plain reading"
    )
    save_receipt("qmatmul", what=what, values=speeds, seed=SEED)


if __name__ == "__main__":
    main()
