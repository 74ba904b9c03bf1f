"""A run killed anywhere ends with the same bits, the same log and whole states only."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import toy

from herd.errors import StorageError, TrainingError
from herd.train import distil, lm, metrics, sft, state, train
from herd.train.storage import RawFiles


class Crash(BaseException):
    """What no handler of the loop may catch."""


def crash_at(step):
    def evaluate(model, now):
        if now == step:
            raise Crash
        return {"first_weight": model.lm_head.weight[0, 0].item()}

    return evaluate


def test_a_crash_after_any_step_changes_no_bit(tmp_path):
    """Crash in step k's evaluation, when the state of step k - 1 is the newest.

    The resumed run must end as if nothing had happened.
    """
    config = toy.config(steps=7, save_every=1, eval_every=1)
    whole = toy.model()
    train(whole, toy.Masked(), sft, config, tmp_path / "whole", evaluate=crash_at(None))
    log = toy.timeless(metrics.read(tmp_path / "whole"))
    assert len(log) == 14
    for step in range(1, 8):
        folder = tmp_path / str(step)
        with pytest.raises(Crash):
            train(toy.model(), toy.Masked(), sft, config, folder, evaluate=crash_at(step))
        resumed = toy.model(seed=9)  # whatever the model holds, the state replaces it
        result = train(resumed, toy.Masked(), sft, config, folder, evaluate=crash_at(None))
        if step > 1:
            assert result.resumed_from == step - 1
            assert toy.bits(resumed) == toy.bits(whole)
            assert toy.timeless(metrics.read(folder)) == log


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.soak), 8])
def test_kill_9_at_every_change_of_the_folder(tmp_path, every):
    script = Path(__file__).parent / "kill_sweep.py"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["failures"] == []
    assert outcome["points"] > 30


@pytest.mark.parametrize("where", ["write_data", "finish"])
def test_a_crash_while_saving_leaves_the_earlier_state(tmp_path, monkeypatch, where):
    config = toy.config(save_every=2)
    whole = toy.model()
    train(whole, toy.Counting(), lm, config, tmp_path / "whole")
    folder, real, calls = tmp_path / "crashed", getattr(RawFiles, where), []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Crash
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RawFiles, where, second_fails)
        with pytest.raises(Crash):
            train(toy.model(), toy.Counting(), lm, config, folder)
    assert [path.name for path in state.states(folder)] == ["step-00000002"]
    resumed = toy.model(seed=9)
    assert train(resumed, toy.Counting(), lm, config, folder).resumed_from == 2
    assert toy.bits(resumed) == toy.bits(whole)
    assert not list((folder / "state").glob(".*"))


def test_a_finished_run_only_loads(tmp_path):
    config = toy.config(eval_every=2)
    first, again = toy.model(), toy.model(seed=9)
    done = train(first, toy.Counting(), lm, config, tmp_path, evaluate=lambda m, s: {})

    def never(*args):
        raise Crash

    class Unread(toy.Counting):
        batch = never

    result = train(again, Unread(), lm, config, tmp_path, evaluate=never, on_step=never)
    assert toy.bits(again) == toy.bits(first)
    assert (result.step, result.resumed_from, result.last) == (6, 6, done.last)


def test_only_the_newest_states_are_kept(tmp_path):
    train(toy.model(), toy.Counting(), lm, toy.config(save_every=1, keep_states=3), tmp_path)
    assert [path.name for path in state.states(tmp_path)] == [f"step-{n:08d}" for n in (4, 5, 6)]


def test_micro_batches_and_checkpointing_may_change_between_starts(tmp_path):
    a, b = toy.model(), toy.model()
    with pytest.raises(Crash):
        train(a, toy.Counting(), lm, toy.config(save_every=3, eval_every=4), tmp_path, evaluate=crash_at(4))
    train(
        b,
        toy.Counting(),
        lm,
        toy.config(save_every=2, micro_batch_size=1, activation_checkpointing=True),
        tmp_path,
    )
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]


# States that do not fit or cannot be read -------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    """A folder with states of steps 2 and 4."""
    with pytest.raises(Crash):
        train(
            toy.model(),
            toy.Counting(),
            lm,
            toy.config(save_every=2, eval_every=5),
            tmp_path,
            evaluate=crash_at(5),
        )
    return tmp_path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 2e-2}, "lr=0.01, not 0.02"),
        ({"steps": 7}, "steps=6, not 7"),
        ({"batch_size": 8}, "batch_size=4, not 8"),
        ({"betas": (0.9, 0.999)}, "betas="),
    ],
)
def test_resuming_with_other_settings_is_refused(stopped, changes, message):
    with pytest.raises(TrainingError, match=message):
        train(toy.model(), toy.Counting(), lm, toy.config(**changes), stopped)


def test_another_model_objective_or_stream_is_refused(stopped):
    with pytest.raises(TrainingError, match=r"step-00000004 was trained with model.n_layers="):
        train(toy.model(n_layers=1), toy.Counting(), lm, toy.config(), stopped)
    with pytest.raises(TrainingError, match="objective='lm', not 'distil'"):
        train(toy.model(), toy.Counting(), distil(toy.model()), toy.config(), stopped)
    stream = toy.Counting()
    stream.signature = {"shards": "abc", "seed": 1}
    with pytest.raises(TrainingError, match="stream=None, not"):
        train(toy.model(), stream, lm, toy.config(), stopped)


def flip_a_bit(path):
    data = bytearray((path / "rank-0.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "rank-0.bin").write_bytes(data)


def truncate(path):
    data = (path / "rank-0.bin").read_bytes()
    (path / "rank-0.bin").write_bytes(data[:-10])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (flip_a_bit, "checksum"),
        (truncate, "ends inside"),
        (lambda path: (path / "rank-0.bin").unlink(), "No such file"),
        (lambda path: (path / "state.json").write_text("{"), "state.json|JSON"),
        (lambda path: (path / "state.json").unlink(), "No such file"),
        (lambda path: (path / ".metadata").write_bytes(b"nonsense"), "corrupt"),
    ],
)
def test_a_corrupt_state_names_itself_and_the_cure(stopped, damage, reason):
    damage(stopped / "state" / "step-00000004")
    cure = r"step-00000004 is corrupt .*: remove this folder to resume from step-00000002"
    with pytest.raises(TrainingError, match=cure) as error:
        train(toy.model(), toy.Counting(), lm, toy.config(), stopped)
    assert "\n" not in str(error.value)
    with pytest.raises(TrainingError, match=reason):
        train(toy.model(), toy.Counting(), lm, toy.config(), stopped)
    whole, resumed = toy.model(), toy.model()
    shutil.rmtree(stopped / "state" / "step-00000004")
    assert train(resumed, toy.Counting(), lm, toy.config(), stopped).resumed_from == 2
    train(whole, toy.Counting(), lm, toy.config(), stopped / "whole")
    assert toy.bits(resumed) == toy.bits(whole)


def test_a_corrupt_state_without_an_older_one_says_to_start_again(tmp_path):
    with pytest.raises(Crash):
        train(
            toy.model(),
            toy.Counting(),
            lm,
            toy.config(save_every=2, eval_every=3),
            tmp_path,
            evaluate=crash_at(3),
        )
    truncate(tmp_path / "state" / "step-00000002")
    with pytest.raises(TrainingError, match="remove this folder to start from the beginning"):
        train(toy.model(), toy.Counting(), lm, toy.config(), tmp_path)


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_one_line_and_keeps_what_was(stopped, monkeypatch):
    free = iter([10**9, 1000])  # it fills up during the first step
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, next(free)))
    with pytest.raises(
        TrainingError,
        match=r"cannot save state .*and the disk has 1\.00 kB free; free disk .*step-00000004 is kept",
    ) as error:
        train(toy.model(), toy.Counting(), lm, toy.config(), stopped)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more, states", [({"save_every": 2}, 2), ({"save_every": 1, "keep_states": 1}, 2), ({}, 1)]
)
def test_a_disk_too_small_for_states_and_result_is_noticed_before_the_first_step(
    tmp_path, monkeypatch, more, states
):
    model = toy.model()
    weights = 4 * model.config.n_params
    needed = (4 * states + 1) * weights + 5000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, needed - 1))
    steps = []
    arguments = (model, toy.Counting(), lm, toy.config(**more), tmp_path)
    with pytest.raises(StorageError, match=r"needs .* [kM]B, and the disk has .* free"):
        train(*arguments, on_step=steps.append, result_nbytes=5000)
    assert not steps
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, needed))
    train(*arguments, on_step=steps.append, result_nbytes=5000)


def test_a_disk_that_fills_up_while_saving(stopped, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RawFiles, "write_data", full)
    with pytest.raises(
        TrainingError, match=r"cannot save state .*No space left on device; .*step-00000004 is kept"
    ):
        train(toy.model(), toy.Counting(), lm, toy.config(), stopped)
    assert [p.name for p in (stopped / "state").iterdir() if p.name.startswith(".")] == []


def test_half_a_line_in_the_log_is_dropped_and_a_broken_one_named(stopped):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(toy.model(), toy.Counting(), lm, toy.config(), stopped)
    assert [r["step"] for r in metrics.read(stopped)] == [1, 2, 3, 4, 5, 6]
    path = stopped / "metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(TrainingError, match=r"metrics.jsonl:1 is not a metrics record"):
        train(toy.model(), toy.Counting(), lm, toy.config(), stopped)


def test_storage_keeps_any_tensor(tmp_path):
    from herd.train.parallel import Ranks

    tensors = {
        "bf16": torch.randn(5, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "int": torch.tensor([[1, -2]]),
    }
    progress = state.Progress(1, 0.0, {}, 0, False, 1, {})
    path = state.save(tmp_path, progress, tensors, Ranks(), keep=1)
    loaded = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    state.load(path, loaded, Ranks())
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    assert state.progress_of(path) == progress
