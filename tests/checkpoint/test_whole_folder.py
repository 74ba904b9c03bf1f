"""Whatever happens while a folder is written, the old one stays, and no half of a new one is ever seen."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import herd.checkpoint as checkpoint
from herd import files
from herd.errors import CheckpointError, StorageError

WRITER = """
import os, resource, signal, sys, torch
import herd.checkpoint as checkpoint
from herd.errors import StorageError

folder, how = sys.argv[1:]
model = checkpoint.load_model(folder)
params, asked = dict(model.named_parameters()), 0

def get(name):
    global asked
    asked += 1
    if how == "kill" and asked == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return params[name] + 1

if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoint.write_checkpoint(folder, model.config, get, dtype=torch.float32)
except StorageError as error:
    print(error)
    sys.exit(3)
"""


@pytest.fixture
def old(tmp_path, make_model):
    checkpoint.save_model(tmp_path / "x", make_model())
    return tmp_path / "x"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_elsewhere(folder, how):
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), how], capture_output=True, text=True, timeout=600
    )


def test_disk_full(old):
    before = contents(old)
    done = write_elsewhere(old, "full")
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("\n") == 1
    assert "disk is full" in done.stdout
    assert contents(old) == before
    assert os.listdir(old.parent) == ["x"]


def test_killed(old, make_model, same_bits):
    before = contents(old)
    assert write_elsewhere(old, "kill").returncode == -signal.SIGKILL
    assert contents(old) == before
    assert len(os.listdir(old.parent)) == 2
    checkpoint.save_model(old, make_model(seed=1))  # and the next writer sweeps up
    same_bits(checkpoint.load_model(old), make_model(seed=1))
    assert os.listdir(old.parent) == ["x"]


def test_too_little_room_is_seen_before_writing(old, make_model, monkeypatch):
    before = contents(old)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match=r"the disk has 1\.00 kB free"):
        checkpoint.save_model(old, make_model(seed=1))
    assert contents(old) == before


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError(28, "No space left")]
)
def test_interrupted(old, make_model, error):
    before = contents(old)
    asked = []

    def get(name):
        asked.append(name)
        if len(asked) == 5:
            raise error
        return torch.zeros(dict(model.config.param_shapes())[name])

    model = make_model()
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        checkpoint.write_checkpoint(old, model.config, get, dtype=torch.float32)
    assert contents(old) == before
    assert os.listdir(old.parent) == ["x"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replace(old, make_model, same_bits, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    checkpoint.save_model(old, make_model(seed=1), max_shard_bytes=50_000)
    same_bits(checkpoint.load_model(old), make_model(seed=1))
    assert not (old / "model.safetensors").exists()
    assert os.listdir(old.parent) == ["x"]


def test_second_rename_fails(old, make_model, monkeypatch):
    before = contents(old)
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    rename, calls = os.rename, []

    def failing(a, b):
        calls.append((a, b))
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        checkpoint.save_model(old, make_model(seed=1))
    assert contents(old) == before
    assert os.listdir(old.parent) == ["x"]


def test_only_a_checkpoint_is_replaced(tmp_path, make_model):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("five years")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex"):
        checkpoint.save_model(precious, make_model())
    assert contents(precious) == {"thesis.tex": b"five years"}
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.save_model(precious / "thesis.tex", make_model())
    (tmp_path / "empty").mkdir()
    checkpoint.save_model(tmp_path / "empty", make_model())


def test_through_a_link_and_into_new_folders(tmp_path, make_model, same_bits):
    checkpoint.save_model(tmp_path / "deep" / "er" / "real", make_model())
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "real")
    checkpoint.save_model(tmp_path / "link", make_model(seed=1))
    assert (tmp_path / "link").is_symlink()
    same_bits(checkpoint.load_model(tmp_path / "deep" / "er" / "real"), make_model(seed=1))


def test_unwritable_parent(tmp_path, make_model):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        checkpoint.save_model(tmp_path / "file" / "x", make_model())


def test_other_writers_are_left_alone(tmp_path):
    """Leftovers of dead processes on this machine go. Those of the living and of other machines stay."""
    target = tmp_path / "x"
    node = files.platform.node()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".x.tmp-{node}-{dead.pid}-aa": False, f".x.tmp-{node}-{os.getppid()}-aa": True}
    names |= {f".x.tmp-elsewhere-{dead.pid}-aa": True, f".xy.tmp-{node}-{dead.pid}-aa": True}
    for name in names:
        (tmp_path / name).mkdir()
    with files.whole_folder(target) as temporary:
        (temporary / "a").write_text("1")
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert contents(target) == {"a": b"1"}
