"""Compare this checkout with an older one: a run, decoding, a prompt and training steps, alternated.

    git worktree add ../old COMMIT
    python bench/versions.py ../old                  # all works, 7 pairs
    python bench/versions.py ../old --only train     # run, decode, prefill, train or suite
    python bench/versions.py ../old --only suite --pairs 1

Both checkouts run with the same Python and the same installed packages, one after the other in each pair. The ratio
of a pair is the old one's seconds divided by the new one's (above 1: the new one is faster). Reported are the median
of the ratios and a 95 % interval from the order statistics of the pairs (sign test). `suite` runs the tests of each
checkout, which differ, so its ratio says what a developer waits, not how fast the code is.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import ROOT, bench_parser, save_receipt
from herd.report import Value

BAR = 0.98


def run(tree: Path, *words: str, cwd: Path | None = None) -> str:
    """Run Python in a checkout and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd or tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def seconds_of_a_quick_run(tree: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(tree, "-m", "herd", "raise", "--quick", cwd=Path(folder))
        return time.perf_counter() - began


def seconds_of_a_suite(tree: Path) -> float:
    began = time.perf_counter()
    run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    return time.perf_counter() - began


def speed(work: str) -> Callable[[Path], float]:
    """Return a function that gives the seconds per token of `herd bench` for decode or prefill, 8B width, 4 layers."""

    def seconds(tree: Path) -> float:
        words = "bench --size 8B --layers 4 --quant q4 --rounds 3 --steps 32 --json"
        records = json.loads(run(tree, "-m", "herd", *words.split()))["rows"]
        return 1 / next(record["tokens_per_second"] for record in records if record["work"] == work)

    return seconds


def seconds_of_training_steps(tree: Path, steps: int = 3) -> float:
    """Return the median seconds of a training step of `train_throughput.py`'s configuration, in fp32."""
    threads = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, str(tree / "bench" / "train_throughput.py"), "--contestant", "herd fp32"]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [*command, "--threads", threads],
        input="\n" * (steps + 1),
        env=environment,
        capture_output=True,
        text=True,
    )
    taken = [json.loads(line)["seconds"] for line in done.stdout.splitlines()]
    if len(taken) < steps:
        raise SystemExit(f"{tree}: training steps failed:\n{done.stderr[-2000:]}")
    return statistics.median(taken[1:])


WORKS: dict[str, Callable[[Path], float]] = {
    "run": seconds_of_a_quick_run,
    "decode": speed("decode"),
    "prefill": speed("prefill"),
    "train": seconds_of_training_steps,
    "suite": seconds_of_a_suite,
}


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the order statistics that contain the median with at least 95 % probability (all values if too few)."""
    ordered = sorted(ratios)
    n = len(ordered)
    tails = [sum(math.comb(n, i) for i in range(out + 1)) / 2**n for out in range(n)]
    out = max((out for out, tail in enumerate(tails) if tail <= 0.025), default=0)
    return ordered[out], ordered[-1 - out]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the older version")
    parser.add_argument("--only", choices=list(WORKS), help="one work; all but the suite if left out")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    old = args.old.resolve()
    names = [args.only] if args.only else [name for name in WORKS if name != "suite"]
    for name in names:
        pairs = []
        for number in range(args.pairs + 1):  # the first pair warms up caches and builds kernels
            pair = [WORKS[name](tree) for tree in (old, ROOT)]
            print(f"{name}: old {pair[0]:.4g} s, new {pair[1]:.4g} s", flush=True)
            if number or args.pairs == 1:
                pairs.append(pair)
        ratios = [before / after for before, after in pairs]
        ratio, (low, high) = statistics.median(ratios), interval(ratios)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=old, capture_output=True, text=True
        ).stdout.strip()
        save_receipt(
            f"versions-{name}",
            what=f"{name}: seconds of the version {commit} divided by this one's, alternated",
            values={
                "ratio": Value(
                    ratio,
                    "ratio",
                    low,
                    high,
                    f"≥ {BAR}, or 1 in the interval",
                    ratio >= BAR or low <= 1 <= high,
                ),
                "old": (statistics.median(before for before, _ in pairs), "s"),
                "new": (statistics.median(after for _, after in pairs), "s"),
                "pairs": (len(pairs), "pairs"),
            },
        )


if __name__ == "__main__":
    main()
