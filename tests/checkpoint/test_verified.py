"""An unchanged file is hashed once, and again after every change."""

import os
import time

import pytest

from herd import checkpoint
from herd.checkpoint.verified import verified_hash
from herd.errors import CheckpointError
from herd.llama.config import ModelConfig
from herd.quant import scheme
from herd.quant.random import random_quantized


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Return (file, function that gives its noted hash, list of calls)."""
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HERD_VERIFY", raising=False)
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    calls: list[bytes] = []

    def take(file):
        calls.append(file.read_bytes())
        return str(calls[-1])

    return path, lambda: verified_hash(path, take), calls


def test_an_unchanged_file_is_hashed_once(counted):
    _, hashed, calls = counted
    assert hashed() == hashed() == str(b"weights")
    assert len(calls) == 1


def set_back(path):
    """Other bytes with the old times, as far as a program can set them, are noticed."""
    stat = path.stat()
    time.sleep(0.02)  # the system's clock of changes ticks every few milliseconds
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def exchange(path):
    other = path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.replace(other, path)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"longer weights"), set_back, exchange])
def test_a_changed_file_is_hashed_again(counted, change):
    path, hashed, calls = counted
    hashed()
    change(path)
    assert hashed() == str(path.read_bytes()) == str(calls[-1])
    assert len(calls) == 2


def test_a_file_written_during_hashing_is_not_noted(counted, tmp_path):
    path, hashed, calls = counted

    def slow(file):
        path.write_bytes(b"other weights")
        return "old"

    assert verified_hash(path, slow) == "old"
    assert hashed() == str(b"other weights")
    assert len(calls) == 1


def test_notes_that_cannot_be_read_or_written_do_no_harm(counted, tmp_path, monkeypatch):
    _, hashed, calls = counted
    hashed()
    (note,) = (tmp_path / "cache" / "verified").iterdir()
    note.write_text("[")
    hashed()
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "file" / "no"))
    hashed()
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HERD_VERIFY", "always")
    hashed()
    assert len(calls) == 4


def test_damage_is_found_though_the_folder_was_loaded_before(tmp_path, monkeypatch):
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    model = random_quantized(ModelConfig(512, 256, 1, 4, 2, 512), scheme("q8"))
    checkpoint.save_model(tmp_path / "q", model, lineage=checkpoint.Lineage(name="q", stage="test"))
    checkpoint.load_model(tmp_path / "q")
    with (tmp_path / "q" / "model.gguf").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"is not the file that herd\.json describes"):
        checkpoint.load_model(tmp_path / "q")
