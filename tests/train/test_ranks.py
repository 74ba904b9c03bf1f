"""One rank and two (as replicas, and sharded) see the same tokens and compute the same losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch
import toy

from herd.errors import TrainingError
from herd.train import metrics, parallel, state, train
from herd.train.objectives import sft

WORKER = str(Path(__file__).parent / "ranks_worker.py")
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
JOBS = (("sft", "ddp"), ("sft", "fsdp"), ("tied", "fsdp"), ("distil", "fsdp"))
SHARD = {"ddp": 1, "fsdp": 2}


def start(n_ranks: int, *jobs) -> None:
    """Run the jobs one after another in one group of ranks."""
    command = [*COMMAND, f"--nproc-per-node={n_ranks}", WORKER]
    lines = [json.dumps([name, str(folder), *rest]) for name, folder, *rest in jobs]
    done = subprocess.run(command + lines, capture_output=True, text=True, env=ENV, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every job on one rank (here) and on two ranks as replicas (ddp) and as shards (fsdp)."""
    base = tmp_path_factory.mktemp("ranks")
    for name in dict.fromkeys(name for name, _ in JOBS):
        ranks_worker.job(name, base / "one" / name, 1)
    jobs = [(name, base / kind / name, SHARD[kind]) for name, kind in JOBS]
    stopped = base / "stopped"
    try:  # two steps on one rank, the rest on two
        ranks_worker.job("sft", stopped, 1, save_every=2, eval_every=0, keep_states=9)
    finally:
        for path in (stopped / "state").glob("step-0000000[456]"):
            path.rename(base / path.name)
    jobs.append(("sft", stopped, 2, {"save_every": 2, "eval_every": 0}))
    start(2, *jobs)
    return base


@pytest.mark.parametrize("name, kind", JOBS)
def test_two_ranks_reach_the_losses_and_weights_of_one(folder, name, kind):
    one, two = (json.loads((folder / which / name / "log.json").read_text()) for which in ("one", kind))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-5), (a["step"], key)
    one, two = (torch.load(folder / which / name / "weights.pt") for which in ("one", kind))
    assert one.keys() == two.keys()
    for key in one:
        assert (one[key] - two[key]).abs().max() < 1e-5, key


def test_two_ranks_read_the_rows_of_one_in_the_same_order(folder):
    alone = json.loads((folder / "one" / "sft" / "rows-1-0.json").read_text())
    assert alone == list(range(48))
    for kind in ("ddp", "fsdp"):
        parts = [json.loads((folder / kind / "sft" / f"rows-2-{rank}.json").read_text()) for rank in (0, 1)]
        merged = []
        for step in range(6):
            merged += parts[0][step * 4 : step * 4 + 4] + parts[1][step * 4 : step * 4 + 4]
        assert merged == alone


def test_a_run_goes_on_with_another_number_of_ranks(folder):
    records = json.loads((folder / "stopped" / "log.json").read_text())
    whole = json.loads((folder / "one" / "sft" / "log.json").read_text())
    losses = [r["loss"] for r in whole if "loss" in r]
    assert [r["loss"] for r in records if "loss" in r] == pytest.approx(losses, abs=1e-5)
    assert json.loads((folder / "stopped" / "rows-2-1.json").read_text())[:4] == [
        20,
        21,
        22,
        23,
    ]  # from step 3 on
    one, two = (torch.load(folder / which / "weights.pt") for which in ("one/sft", "stopped"))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5


def test_a_state_of_two_ranks_loads_on_one(folder, tmp_path):
    model = toy.model(seed=9)
    (tmp_path / "state").mkdir()
    (folder / "fsdp" / "sft" / "state" / "step-00000006").rename(tmp_path / "state" / "step-00000006")
    config = toy.config(steps=6, batch_size=8, micro_batch_size=2, eps=1e-4)
    assert train(model, toy.Masked(), sft, config, tmp_path).resumed_from == 6
    weights = torch.load(folder / "fsdp" / "sft" / "weights.pt")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert metrics.read(tmp_path) == []


@pytest.mark.soak
def test_ctrl_c_under_torchrun_saves_the_state(tmp_path):
    job = json.dumps(["sft", str(tmp_path), 2, {"steps": 100_000, "eval_every": 0}])
    process = subprocess.Popen(
        [*COMMAND, "--nproc-per-node=2", WORKER, job],
        env=ENV,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(metrics.read(tmp_path)) < 3:
        pass
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert metrics.read(tmp_path)[-1]["step"] == state.progress_of(state.newest(tmp_path)).step < 100_000


def test_ranks_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(TrainingError, match="6 ranks cannot be divided into shards of 4"):
        parallel.start(4)
