"""`herd bench`: what it prints, and what it refuses before it does anything."""

from __future__ import annotations

import json

import pytest

from herd import checkpoint
from herd.checkpoint import memory
from herd.cli import run
from herd.kernels.bandwidth import MemoryReader
from herd.llama.config import SIZES, ModelConfig
from herd.quant import scheme
from herd.quant.random import random_quantized

TINY = ModelConfig(512, 256, 2, 4, 2, 512, max_context=256)
QUICK = ["--rounds", "2", "--steps", "2", "--context", "8", "--prompt", "16"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A size that takes no time, and a small buffer for the bandwidth, read once."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr("herd.kernels.bandwidth.BUFFER", 1 << 20)
    monkeypatch.setattr(MemoryReader.measure, "__defaults__", (0.0,))


def test_random_weights(capsys):
    assert run(["bench", "--size", "tiny", "--batch", "1,3", *QUICK, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [(row["work"], row["batch"]) for row in out["rows"]] == [
        ("decode", 1),
        ("decode", 3),
        ("prefill", 1),
    ]
    assert out["n_params"] == TINY.n_params
    for row in out["rows"]:
        assert row["tokens_per_second"] > 0
    assert out["rows"][0]["share_of_bandwidth"] > 0
    assert 0 < out["rows"][0]["share_between_kernels"] <= 1
    assert out["rival"] is None


@pytest.mark.parametrize("quant", ["q8", "bf16"])
def test_table(quant, capsys):
    assert run(["bench", "--size", "tiny", "--quant", quant, "--layers", "1", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "1 layers" in out.splitlines()[0]
    assert "decode at 8" in out
    assert "prefill of 16" in out
    assert "GB/s in the same rounds" in out


def test_a_folder(tmp_path, capsys):
    checkpoint.save_model(tmp_path / "q", random_quantized(TINY, scheme("q8")))
    assert run(["bench", str(tmp_path / "q"), *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "q")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give a checkpoint folder or --size"),
        (["somewhere", "--size", "8B"], "one of the two"),
        (["somewhere"], "no such folder"),
        (["--size", "9B"], "--size '9B' is not known: choose 405B"),
        (["--size", "tiny", "--quant", "q5"], "'q5' is not known"),
        (["--size", "tiny", "--layers", "3"], "--layers=3 must be between 1 and the 2"),
        (["--size", "tiny", "--batch", "1,,2"], "--batch '1,,2' is not a list"),
        (["--size", "tiny", "--batch", "0"], "is not a list of positive numbers"),
        (["--size", "tiny", "--rounds", "0"], "--rounds=0 must be at least 1"),
        (["--size", "tiny", "--prompt", "-1"], "--prompt=-1 must be at least 1"),
        (["--size", "tiny", "--context", "250"], "the model's context is 256"),
        (["somewhere", "--quant", "q8"], "are for --size"),
        (["--size", "tiny", "--rivals", *QUICK], "make rivals"),
    ],
)
def test_refusals(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HERD_RIVALS", str(tmp_path))
    assert run(["bench", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_what_does_not_fit_is_said_beforehand(capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 8 * 10**9)
    assert run(["bench", "--size", "8B", "--quant", "q8"]) == 1
    err = capsys.readouterr().err
    assert "8.0 GB are free" in err
    assert "--quant q4k or --quant q4 would fit" in err
    assert run(["bench", "--size", "70B"]) == 1
    assert "--size 8B would fit" in capsys.readouterr().err
