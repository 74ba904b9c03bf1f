"""`herd bench`: the numbers it prints, and the mistakes it refuses before it loads anything."""

import json

import pytest

from herd import checkpoint
from herd.cli import run
from herd.kernels.bandwidth import MemoryReader
from herd.llama.config import SIZES, ModelConfig
from herd.quant import scheme
from herd.quant.random import random_quantized

TINY = ModelConfig(512, 256, 2, 4, 2, 512, max_context=256)
QUICK = ["--rounds", "2", "--steps", "2", "--context", "8", "--prompt", "16"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Add a tiny size, and measure the memory's speed on a small buffer that is read once."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr("herd.kernels.bandwidth.BUFFER", 1 << 20)
    monkeypatch.setattr(MemoryReader.measure, "__defaults__", (0.0,))


def test_random_weights_are_measured_for_every_batch_size(capsys):
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


@pytest.mark.parametrize("to", ["q8", "bf16", "Q4_K_M"])
def test_the_table_names_the_model_and_its_speeds(to, capsys):
    assert run(["bench", "--size", "tiny", "--to", to, "--layers", "1", *QUICK]) == 0
    out = capsys.readouterr().out
    named = {"q8": "Q8_0"}.get(to, to.upper())
    assert f"tiny, 1 layer, random {named}" in out.splitlines()[0]
    assert "decode at 8" in out
    assert "prefill of 16" in out
    assert "GB/s in the same rounds" in out


def test_a_checkpoint_folder_is_measured(tmp_path, capsys):
    checkpoint.save_model(tmp_path / "q", random_quantized(TINY, scheme("q8")))
    assert run(["bench", str(tmp_path / "q"), *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "q")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give either a model or --size"),
        (["somewhere", "--size", "8B"], "give either"),
        (["somewhere"], "no such file, folder or model name"),
        (["--size", "9B"], "--size '9B' is not known: choose 405B"),
        (["--size", "tiny", "--to", "q9"], "'q9' is not known"),
        (["--size", "tiny", "--layers", "3"], "--layers=3: tiny has only 2 layers"),
        (["--size", "tiny", "--batch", "1,,2"], "--batch '1,,2' is not a list"),
        (["--size", "tiny", "--batch", "0"], "is not a list of different positive numbers"),
        (["--size", "tiny", "--batch", "2,2"], "is not a list of different positive numbers"),
        (["--size", "tiny", "--batch", ""], "is not a list of different positive numbers"),
        (["--size", "tiny", "--context", "250"], "the model's context is 256"),
        (["somewhere", "--to", "q8"], "need --size"),
        (["--size", "tiny", "--rivals", *QUICK], "make rivals"),
    ],
)
def test_a_mistake_is_refused_in_one_line(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HERD_RIVALS", str(tmp_path))
    assert run(["bench", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    ["--rounds=0", "--prompt=-1", "--context=0", "--steps=0", "--seed=-1", "--layers=0", "--threads=0",
     "--kv=int4", "--rounds=x"],
)  # fmt: skip
def test_an_impossible_number_is_refused_with_its_option(option, capsys):
    assert run(["bench", "--size", "tiny", option]) == 2
    name = option.partition("=")[0]
    assert f"Error: Invalid value for '{name}'" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_loading(capsys, monkeypatch):
    monkeypatch.setattr("herd.machine.available_memory", lambda: 8 * 10**9)
    assert run(["bench", "--size", "8B", "--to", "q8"]) == 1
    err = capsys.readouterr().err
    assert "8.00 GB are free" in err
    assert "--to Q4_K_M or --to Q4_0 would fit" in err
    assert run(["bench", "--size", "70B"]) == 1
    assert "--size 8B would fit" in capsys.readouterr().err
