"""`herd plan train`, `finetune`, `distil` and `machines`: their output, and one-line errors."""

import json
import re

import pytest

from herd.cli import run


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--machine", "1024xH100", "--size", "70B", "--tokens", "1T"],
        ["train", "--layout", "tp=8,pp=16,dp=128,chunks=8,recompute=none,shard=gradients"],
        ["finetune", "--method", "qlora"],
        ["distil", "--teacher", "70B", "--machine", "16xH100"],
    ],
)
def test_the_json_of_a_training_plan_adds_up(arguments, capsys):
    assert run(["plan", *arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    best = record["best"]
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert best["bytes_total"] == pytest.approx(sum(best["bytes"].values()))
    assert best["tokens_per_s"] == pytest.approx(record["batch_tokens"] / best["step_seconds"])
    busy = record["steps"] * best["step_seconds"] / 86_400 + record.get("teacher", {"hours": 0})["hours"] / 24
    assert record["days_without_failures"] == pytest.approx(busy)
    assert record["days"] == pytest.approx(busy / record["goodput"]["effective"])
    usd = record["usd"]
    assert usd["rent"] == pytest.approx(record["device_hours"] * usd["rent_price"]["usd"])


def test_the_tables_say_why_the_winner_is_faster(capsys):
    assert run(["plan", "train", "--budget", "1e6"]) == 0
    out = capsys.readouterr().out
    assert "% ahead of" in out
    assert re.search(r"bubble +\d", out)
    assert "Young–Daly" in out
    assert "1,000,000 USD rent" in out
    assert "not enough" in out


def test_machines_are_listed_as_a_table_and_json(capsys):
    assert run(["plan", "machines"]) == 0
    assert "RTX4090" in capsys.readouterr().out
    assert run(["plan", "machines", "2xRTX4090", "--json"]) == 0
    (machine,) = json.loads(capsys.readouterr().out)
    assert machine["count"] == 2
    assert machine["rent"]


def test_the_page_has_charts_and_loads_nothing(tmp_path, capsys):
    page = tmp_path / "plan.html"
    assert (
        run(["plan", "train", "--size", "8B", "--machine", "64xH100", "--tokens", "1T", "--html", str(page)])
        == 0
    )
    text = page.read_text()
    assert text.count("<svg") >= 6
    assert "<script" not in text
    assert "http" not in re.sub(r"http://www\.w3\.org\S*", "", text)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "--machine", "0xH100"], "0 devices"),
        (["train", "--machine", "8xH101"], "similar names are H100"),
        (["train", "--machine", "H100x8"], "as in 8xH100"),
        (["train", "--context", "256k"], "131,072"),
        (["train", "--size", "9B"], "9B: no such file, folder or model name"),
        (["train", "--budget", "-5"], "out of range"),
        (["train", "--usd-per-hour", "0"], "out of range"),
        (["train", "--tokens", "-1T"], "out of range"),
        (["train", "--batch", "2k"], "one sequence"),
        (["train", "--precision", "int4"], "bf16, fp8"),
        (["train", "--precision", "fp8", "--machine", "2048xA100"], "no FP8"),
        (["train", "--layout", "tp=8,pp=15,dp=128"], "15,360 devices"),
        (["train", "--layout", "tp=eight"], "tp=8"),
        (["train", "--layout", "zp=8"], "tp, cp, pp"),
        (["train", "--layout", "shard=most"], "gradients"),
        (["train", "--restart", "-1"], "out of range"),
        (["train", "--machines", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["train", "--machine", "8xH100"], "would suffice"),
        (["finetune", "--method", "magic"], "full, lora, qlora"),
        (["finetune", "--rank", "0"], "--rank"),
        (["distil", "--teacher", "8B", "--student", "70B"], "exchange"),
        (["distil", "--machine", "2xRTX4090"], "smaller teacher"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(arguments, said, capsys):
    assert run(["plan", *arguments]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
