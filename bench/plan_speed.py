"""Measure how long the planner takes: the first `herd plan`, later ones, and `herd plan leak`.

    python bench/plan_speed.py        # about a minute

The first one begins with an empty cache folder, so it builds the native kernels as well as measuring the
machine. The measuring alone is reported as well. Each verb runs in its own process, as from a shell.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import at_most, bench_parser, save_receipt
from herd.report.receipt import Value

ROUNDS = 5
COLD, WARM = 45.0, 1.0
"""Seconds allowed for the first `herd plan`, and for a call that measures nothing."""


def seconds(verb: list[str], cache: str) -> float:
    """Return the seconds that ``herd VERB`` takes from start to end."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "herd", *verb]
    subprocess.run(words, env=os.environ | {"HERD_CACHE": cache}, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure the first call, then every verb several times."""
    bench_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="herd-plan-speed-") as cache:
        cold = seconds(["plan"], cache)
        measuring = json.loads((Path(cache) / "profile.json").read_text())["seconds"]
        print(f"herd plan, the first time: {cold:.1f} s, {measuring:.1f} s of them measuring")
        values = {
            "herd plan, the first time": at_most(COLD, cold, "s", shown=f"≤ {COLD:g} s"),
            "herd plan, the first time, measuring": Value(measuring, "s"),
        }
        for verb in (["plan"], ["plan", "run", "--size", "70B", "--machine", "2xRTX4090"], ["plan", "leak"]):
            times = sorted(seconds(verb, cache) for _ in range(ROUNDS))
            middle, name = statistics.median(times), f"herd {' '.join(verb)}"
            print(f"{name}: {middle:.2f} s ({times[0]:.2f} to {times[-1]:.2f})")
            values[name] = at_most(WARM, middle, "s", times[0], times[-1], shown=f"≤ {WARM:g} s")
    save_receipt(
        "plan-speed",
        what="seconds until the planner answers: first call, with a saved profile, herd plan leak",
        values=values,
        notes=f"Medians of {ROUNDS}, with the lowest and the highest. The first time builds the native "
        "kernels too.",
    )


if __name__ == "__main__":
    main()
