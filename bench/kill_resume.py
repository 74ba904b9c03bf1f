"""Kill `herd raise --quick` with kill -9 at random moments and check that --resume gives the same weights.

    python bench/kill_resume.py             # 20 kills, about 5 minutes on two cores

One run is not disturbed, and is timed. Others are killed twice (SIGKILL to the whole process group) at
moments drawn uniformly over that time, resumed after each kill and finished, until all kills are done. After
every kill, each checkpoint folder that exists must load: no incomplete folder may ever have a final name.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import at_least, bench_parser, exactly, run_quietly, save_receipt
from herd.checkpoint import checkpoint_hash, load_model
from herd.report.receipt import Value

MODELS = ("teacher", "long", "instruct", "student", "control")


def command(runs: Path, name: str, seed: int) -> list[str]:
    words = ["--name", name, "--runs", str(runs), "--seed", str(seed), "--resume"]
    return [sys.executable, "-m", "herd", "raise", "--quick", *words]


def hashes(folder: Path) -> dict[str, str]:
    """Weights' hash of every checkpoint. Loading each proves that it is whole."""
    found = {}
    for name in MODELS:
        if (folder / name).exists():
            load_model(folder / name)
            found[name] = checkpoint_hash(folder / name)
    return found


def stage_of(folder: Path) -> str:
    """The stage a killed run was in: the first that is not done."""
    order = ("tokenizer", *MODELS, "measure", "report")
    return next((s for s in order if not (folder / "stages" / s / "stage.json").exists()), "end")


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    randomness = random.Random(options.seed)
    runs = Path(tempfile.mkdtemp(prefix="herd-kill-"))
    try:
        began = time.monotonic()
        subprocess.run(command(runs, "whole", options.seed), check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - began
        expected = hashes(runs / "whole")
        print(f"undisturbed: {length:.0f} s, {len(expected)} checkpoints")

        stages: dict[str, int] = {}
        kills = broken = rounds = 0
        while kills < options.kills:
            rounds += 1
            name = f"killed{rounds}"
            # Twice in each life, the second time sooner: starting costs seconds, and what is done is not done
            # again.
            for longest in (length, length / 2):
                patience = randomness.uniform(0.15 * length, longest)
                if run_quietly(command(runs, name, options.seed), patience) is not None:
                    continue  # it was done before its time came
                kills += 1
                stage = stage_of(runs / name)
                stages[stage] = stages.get(stage, 0) + 1
                now = hashes(runs / name)
                broken += sum(now[m] != expected[m] for m in now)
                print(f"kill {kills}: after {patience:.1f} s in {stage}", flush=True)
            if code := run_quietly(command(runs, name, options.seed)):
                raise SystemExit(f"{name}: a resumed run ended with exit code {code}")
            different = [m for m, h in hashes(runs / name).items() if h != expected[m]]
            broken += len(different)
            print(f"{name}: done, {'identical' if not different else f'DIFFERENT: {different}'}", flush=True)
        save_receipt(
            "kill-resume",
            what="`herd raise --quick` killed at random and resumed: weights of an undisturbed run",
            values={
                "kills": at_least(20, kills, "kills"),
                "different": exactly(0, broken, "checkpoints"),
                "lives": Value(rounds, "runs brought to their end"),
                **{f"in_{stage}": Value(n, "kills") for stage, n in stages.items()},
            },
            seed=options.seed,
        )
        if broken:
            raise SystemExit(1)
    finally:
        shutil.rmtree(runs)


if __name__ == "__main__":
    main()
