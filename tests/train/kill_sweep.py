"""Kills a training run at every system call that changes its folder, resumes it, and compares bits.

Run as a program, which never trains itself: each run is a forked child, so that a sweep of dozens of kills
costs one import of torch. Prints one JSON object. See `test_resume.py`.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it when first used: 2 s once, not in every child
import toy

from herd.train import lm, metrics, train

POINTS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
CONFIG = {"steps": 6, "save_every": 2, "eval_every": 2, "batch_size": 2, "keep_states": 1}


def run(folder: Path, result: Path, kill_at: int) -> None:
    """Train in this process. The ``kill_at``-th call (from 0) of a point is the last thing it does."""
    calls = 0

    def guarded(real):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*args, **kwargs)

        return call

    for name in POINTS:
        setattr(os, name, guarded(getattr(os, name)))
    model = toy.model()
    train(
        model,
        toy.Counting(),
        lm,
        toy.config(**CONFIG),
        folder,
        evaluate=lambda m, step: {"x": m.lm_head.weight.sum().item()},
    )
    total = calls
    calls = -1_000_000
    torch.save(dict(model.named_parameters()), result)
    result.with_suffix(".json").write_text(
        json.dumps({"calls": total, "log": toy.timeless(metrics.read(folder))})
    )


def child(folder: Path, result: Path, kill_at: int) -> int:
    """Exit status of a forked run, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, result, kill_at)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(base: Path, every: int) -> dict:
    whole = base / "whole.pt"
    assert child(base / "whole", whole, -1) == 0
    wanted = json.loads(whole.with_suffix(".json").read_text())
    outcome: dict = {"points": wanted["calls"], "failures": []}
    for point in range(0, wanted["calls"], every):
        folder, result = base / f"killed-{point}", base / f"{point}.pt"
        killed = child(folder, result, point)
        halves = [p.name for p in (folder / "state").glob("step-*") if not (p / "state.json").exists()]
        resumed = child(folder, result, -1)
        got = json.loads(result.with_suffix(".json").read_text()) if resumed == 0 else {}
        same = resumed == 0 and all(
            torch.equal(a, b)
            for a, b in zip(torch.load(whole).values(), torch.load(result).values(), strict=True)
        )
        left = [p.name for p in (folder / "state").iterdir() if p.name.startswith(".")]
        if killed != -signal.SIGKILL or halves or not same or got["log"] != wanted["log"] or left:
            outcome["failures"].append([point, killed, resumed, halves, same, left])
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
