"""Interrupted conversions continue where they stopped and give the same result."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from herd import checkpoint
from herd.checkpoint import gguf_folder, journal, weights
from herd.errors import QuantError, StorageError
from herd.quant import scheme

KINDS = {
    "quantize": lambda a, out: checkpoint.quantize_folder(checkpoint.ImportSource(a), out, scheme("q4")),
    "import": lambda a, out: checkpoint.import_hf(a, out),
    "export hf": lambda a, out: checkpoint.export_hf(a, out, dtype=torch.bfloat16),
    "export gguf": lambda a, out: checkpoint.export_gguf(a, out.with_suffix(".gguf"), "q8_0"),
}
SHAPE = {"dim": 64, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 96, "head_dim": 0, "n_layers": 3}


def contents(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def interrupted(monkeypatch, plain, tmp_path):
    """interrupted(kind, n): Ctrl-C as the n-th tensor is asked for. Gives (result's path, tensors read after
    that)."""
    monkeypatch.setattr(journal, "SAVE_EVERY", 1)
    monkeypatch.setattr("herd.checkpoint.write.MAX_SHARD_BYTES", 60_000)
    read = weights.read_tensor
    asked: list[str] = []

    def run(kind, n, before_resuming=lambda: None):
        def stop_at_n(info):
            if len(asked) == n:
                raise KeyboardInterrupt
            asked.append(info.name)
            return read(info)

        out = tmp_path / "out"
        monkeypatch.setattr(weights, "read_tensor", stop_at_n)
        with pytest.raises(KeyboardInterrupt):
            KINDS[kind](plain, out)
        assert not out.exists()
        assert not out.with_suffix(".gguf").exists()
        before_resuming()
        first, asked[:] = list(asked), []
        monkeypatch.setattr(weights, "read_tensor", lambda info: asked.append(info.name) or read(info))
        KINDS[kind](plain, out)
        return (out.with_suffix(".gguf") if kind == "export gguf" else out), first, list(asked)

    return run


@pytest.mark.parametrize("n", [1, 9, 28])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_conversion_continues_where_it_stopped(interrupted, plain, tmp_path, kind, n):
    path, first, second = interrupted(kind, n)
    names = [name for name, _ in checkpoint.load_config(plain).param_shapes()]
    assert first + second == names  # nothing twice, nothing left out
    whole = KINDS[kind](plain, tmp_path / "whole")
    theirs = contents(tmp_path / "whole.gguf" if kind == "export gguf" else tmp_path / "whole")
    ours = contents(path)
    if kind == "export gguf":
        assert list(ours.values()) == list(theirs.values())
    else:
        name = b"out" if kind == "import" else b"toy"
        assert ours.keys() == theirs.keys()
        for file in ours:
            assert ours[file] == theirs[file].replace(b"whole", name) or file == "herd.json", file
        assert checkpoint.checkpoint_hash(path) == whole == checkpoint.load_lineage(path).weights_hash
        assert checkpoint.load_lineage(path).parents == checkpoint.load_lineage(tmp_path / "whole").parents
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_only_the_same_conversion_is_continued(interrupted, plain, tmp_path):
    """Another source starts from the beginning. A changed time stamp makes it another."""
    file = plain / "model.safetensors"
    path, _, second = interrupted("quantize", 9, lambda: os.utime(file, (1, time.time_ns() % 10**9)))
    assert len(second) == len(list(checkpoint.load_config(plain).param_shapes()))
    assert checkpoint.checkpoint_hash(path) == checkpoint.load_lineage(path).weights_hash


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: (part / "journal.json").write_text("{"),
        lambda part: (part / "model.gguf").unlink(),
        lambda part: (part / "model.gguf").write_bytes(b"x" * 100_000),
        lambda part: (part / "journal.json").write_text(json.dumps({"key": 1, "done": 2})),
    ],
    ids=["journal", "no file", "another file", "another journal"],
)
def test_a_damaged_journal_or_file_starts_over(interrupted, plain, tmp_path, damage):
    path, _, second = interrupted("quantize", 9, lambda: damage(tmp_path / ".out.part"))
    assert len(second) == len(list(checkpoint.load_config(plain).param_shapes()))
    checkpoint.load_model(path)


def test_what_was_written_since_the_last_save_is_written_again(interrupted, plain, tmp_path):
    def grow():
        with (tmp_path / ".out.part" / "model.gguf").open("ab") as file:
            file.write(b"half a tensor")

    path, _, second = interrupted("quantize", 9, grow)
    assert len(second) == len(list(checkpoint.load_config(plain).param_shapes())) - 9
    assert checkpoint.load_model(path).model.embed_tokens.blocks.shape[0] == 600


def test_two_processes_cannot_write_one_folder(plain, tmp_path, monkeypatch):
    def meanwhile(*args, **more):
        with pytest.raises(StorageError, match=f"out.part: process {os.getpid()} is working in this folder"):
            KINDS["quantize"](plain, tmp_path / "out")
        return write(*args, **more)

    write = gguf_folder.write_model
    monkeypatch.setattr(gguf_folder, "write_model", meanwhile)
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "out", scheme("q8"))
    checkpoint.load_model(tmp_path / "out")


def test_a_conversion_that_failed_leaves_nothing(plain, tmp_path, monkeypatch):
    """A conversion that would fail again is not kept, however far it came."""
    monkeypatch.setattr(journal, "SAVE_EVERY", 1)
    read, seen = weights.read_tensor, []

    def fail(error):
        def reading(info):
            seen.append(info.name)
            if len(seen) % 10 == 0:
                raise error
            return read(info)

        return reading

    for error, raised in ((OSError(28, "full"), StorageError), (QuantError("bad"), QuantError)):
        monkeypatch.setattr(weights, "read_tensor", fail(error))
        with pytest.raises(raised):
            KINDS["quantize"](plain, tmp_path / "out")
        assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, time
from herd import checkpoint
from herd.checkpoint import journal, weights
from herd.quant import scheme
journal.SAVE_EVERY, read = 1, weights.read_tensor
def slowly(info):
    time.sleep(0.03)
    return read(info)
weights.read_tensor = slowly
checkpoint.quantize_folder(checkpoint.ImportSource(sys.argv[1]), sys.argv[2], scheme("q4"))
"""


def test_a_killed_conversion_continues(plain, tmp_path, monkeypatch):
    """After kill -9 in the middle, the next run reads only the remaining tensors."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(plain), str(tmp_path / "out")]) as process:
        state = tmp_path / ".out.part" / "journal.json"
        while not state.exists() or json.loads(state.read_text())["done"] < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    done = json.loads(state.read_text())["done"]
    read, asked = weights.read_tensor, []
    monkeypatch.setattr(weights, "read_tensor", lambda info: asked.append(info.name) or read(info))
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "out", scheme("q4"))
    assert (
        len(asked) == len(list(checkpoint.load_config(plain).param_shapes())) + 1 - done
    )  # and RoPE's table
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "whole", scheme("q4"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
