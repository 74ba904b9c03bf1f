"""`herd eval ladder` prints the same scores as `herd eval` does for each number of examples."""

import json

import pytest

from herd import checkpoint
from herd.checkpoint import Lineage
from herd.cli import run as herd


@pytest.fixture
def models(tmp_path, make_model, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in ((1, "base"), (2, "tuned")):
        checkpoint.save_model(
            tmp_path / name,
            make_model(seed, max_context=2048),
            tokenizer,
            lineage=Lineage(name=name, stage="lm"),
        )
    return tmp_path


def test_each_step_is_the_score_of_a_plain_evaluation(models, capsys):
    assert herd(["eval", "ladder", "piqa", "base", "tuned", "--shots", "0,1", "--limit", "6", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["model"], step["shots"]) for step in steps] == [
        ("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1),
    ]  # fmt: skip
    for step in steps:
        words = ["--tasks", "piqa", "--shots", str(step["shots"]), "--limit", "6", "--json"]
        assert (
            herd(["eval", step["model"], *words, "--out", str(models / f"{step['model']}{step['shots']}")])
            == 0
        )
        (task,) = json.loads(capsys.readouterr().out)["tasks"]
        assert task["scores"][0]["value"] == step["value"]


def test_the_table_has_a_row_for_each_model(models, capsys):
    assert herd(["eval", "ladder", "piqa", "base", "tuned", "--shots", "0,1", "--limit", "4"]) == 0
    said = capsys.readouterr().out
    assert "0 shots" in said
    assert "1 shots" in said
    assert [line.split()[0] for line in said.splitlines()[2:4]] == ["base", "tuned"]


def test_bad_numbers_are_refused(models, capsys):
    assert herd(["eval", "ladder", "piqa", "base", "--shots", "0,x"]) == 1
    assert "--shots 0,x: give numbers" in capsys.readouterr().err
