"""A whole shrink run on a toy: the budget is met, the ledger is true, and an interrupted run goes on cell by cell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_shrink import settings
from transformers import AutoModelForCausalLM

from herd.checkpoint import load_config, load_lineage, load_model, load_tokenizer
from herd.distill import cells
from herd.distill.forecast import forecast
from herd.distill.shrink import Shrinker, rank_correlation
from herd.errors import ConfigError
from herd.train.recipe import read_recipe


def test_the_student_meets_the_budget_and_loads_as_a_plain_checkpoint(done, toy):
    _, shrunk, _, _ = done
    config = load_config(shrunk.folder)
    assert config.n_params <= 36_000 < load_config(toy / "teacher").n_params
    student, tokenizer = load_model(shrunk.folder), load_tokenizer(shrunk.folder)
    assert (
        student.logits(torch.tensor([tokenizer.encode("the quick")])).shape[-1]
        == tokenizer.vocab_size
        == config.vocab_size
    )
    known = load_lineage(shrunk.folder)
    assert known.name.startswith("Llama-toy-")
    assert known.licence == "Llama 3.1 Community License"
    theirs = AutoModelForCausalLM.from_pretrained(shrunk.folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("the lazy dog and")])
    ours = load_model(shrunk.folder, dtype=torch.float32).logits(ids)
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=1e-4)


def test_the_ledger_has_every_step_and_control_with_intervals(done):
    out, _, _, _ = done
    ledger = json.loads((out / "ledger.json").read_text())
    steps = {step["name"]: step for step in ledger["steps"]}
    assert steps["teacher"]["kl"]["value"] == 0
    assert (
        sum("control" in step["what"] for step in ledger["steps"])
        == sum(step["control"] for step in ledger["steps"])
        >= 2
    )
    for step in ledger["steps"]:
        for name in ("bits_per_byte", "kl", "accuracy"):
            assert step[name]["lo"] <= step[name]["value"] <= step[name]["hi"]
    trained = [step for step in ledger["steps"] if step["tokens"]]
    assert all(step["flops"] > 0 and step["seconds"] > 0 for step in trained)
    scratch = next(step for step in trained if "scratch" in step["what"])
    raced = next(
        step
        for step in trained
        if step["name"] == scratch["name"].partition("-scratch")[0] + ", 1,024 tokens"
    )
    assert scratch["teacher_flops"] == 0 < raced["teacher_flops"]
    one_step = scratch["flops"] * 128 / scratch["tokens"]
    assert scratch["flops"] == pytest.approx(raced["flops"] + raced["teacher_flops"], abs=one_step)
    final, start = ledger["steps"][-1], next(s for s in ledger["steps"] if s["name"].endswith("start"))
    assert final["tokens"] == 4096
    assert final["kl"]["value"] < start["kl"]["value"]
    page = (out / "ledger.html").read_text()
    assert all(step["name"] in page for step in ledger["steps"])


def test_the_recipe_that_was_run_is_on_disk(done):
    out, _, _, _ = done
    found = [read_recipe(path) for path in out.glob("arms/*/recipe-4096-*.yaml")]
    assert [recipe.train.steps for recipe in found] == [32]
    assert found[0].objective.kind == "sampled_distil"


def test_a_second_run_computes_nothing(done, toy):
    out, shrunk, _, _ = done
    lines: list[str] = []
    before = (shrunk.folder / "model.safetensors").read_bytes()
    Shrinker(out, settings(toy, vocab=(572, 540)), lines.append).run()
    assert not [line for line in lines if "about" in line]
    assert (shrunk.folder / "model.safetensors").read_bytes() == before


def test_other_settings_are_refused_and_named(done, toy):
    out, *_ = done
    with pytest.raises(ConfigError, match="begun with context=32, not 64"):
        Shrinker(out, settings(toy, vocab=(572, 540), context=64))


def test_another_learning_rate_and_other_sizes_use_the_same_targets_and_lose_no_student(toy, tmp_path):
    def files(pattern: str) -> dict[Path, int]:
        found = tmp_path.glob(f"run/{pattern}")
        return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

    first = {"to": None, "vocab": (540,), "tokens": 512, "gguf": "q4"}
    bad = Shrinker(tmp_path / "run", settings(toy, **first, lr=0.3)).run()
    before, labels = files("cells/*") | files("arms/**/*"), files("targets-540/shard*")
    lines: list[str] = []
    good = Shrinker(tmp_path / "run", settings(toy, **first, lr=1e-3), lines.append).run()
    assert good.ledger["steps"][-1]["kl"] != bad.ledger["steps"][-1]["kl"]
    assert files("targets-540/shard*") == labels
    now = files("cells/*") | files("arms/**/*")
    assert {path: now.get(path) for path in before} == before
    assert not [line for line in lines if "labelling" in line or "making" in line]
    again = Shrinker(tmp_path / "run", settings(toy, **first, lr=0.3)).run()
    assert again.ledger["steps"] == bad.ledger["steps"]
    more = Shrinker(tmp_path / "run", settings(toy, **(first | {"tokens": 4096, "qad_tokens": 512}))).run()
    assert [step["tokens"] for step in more.ledger["steps"]] == [0, 0, 4096, 0, 512]
    own = settings(toy, **first, own_text=True)
    Shrinker(tmp_path / "own", own).pipeline.teacher_hash  # noqa: B018 -- a cell, after which the settings are stored
    (tmp_path / "own" / "own").mkdir()
    with pytest.raises(ConfigError, match="begun with tokens=512, not 1024"):
        Shrinker(tmp_path / "own", own.model_copy(update={"tokens": 1024}))


def test_the_time_is_printed_beforehand(done):
    _, _, lines, shrinker = done
    assert [line for line in lines if "on 4,096 tokens: about" in line]
    cells = forecast(shrinker)
    assert sum(cell.seconds for cell in cells) > 0
    label = next(cell for cell in cells if "label" in cell.name)
    assert label.nbytes > 0


def test_an_interrupted_run_ends_with_the_same_weights(done, toy, tmp_path):
    whole, shrunk, _, _ = done
    code = (
        "import sys; from pathlib import Path; from herd.distill.shrink import Shrinker; sys.path.insert(0, {!r}); "
        "from toy_shrink import settings; "
        "Shrinker(Path({!r}), settings(Path({!r}), vocab=(572, 540)), lambda line: print(line, flush=True)).run()"
    ).format(str(Path(__file__).parent), str(tmp_path / "run"), str(toy))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:  # type: ignore[union-attr]
        if "on 1,024 tokens: about" in line:
            time.sleep(0.1)
            process.kill()  # SIGKILL, in the middle of training the first arm
            break
    process.wait()
    assert not (tmp_path / "run" / "model").exists()
    again = Shrinker(tmp_path / "run", settings(toy, vocab=(572, 540))).run()
    assert (again.folder / "model.safetensors").read_bytes() == (
        shrunk.folder / "model.safetensors"
    ).read_bytes()
    for path in sorted(whole.glob("targets-*/*.bin")):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(whole)).read_bytes()


def test_what_is_done_is_said_in_words_with_the_time_left(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "SILENCE", (0.0, 0.0))
    lines: list[str] = []
    chosen = settings(toy, race_tokens=384, tokens=512, lr=None, sweep_tokens=256, vocab=(572, 540))
    Shrinker(tmp_path / "run", chosen, lines.append).run()
    students = {"2 layers and 2 heads", "2 layers and a vocabulary of 540"}
    said = "\n".join(lines)
    for of in students:
        assert re.search(
            rf"training the student of {of} on 384 tokens: step 2 of 3, loss [\d.]+, [\d.]+ m?s left", said
        )
    assert re.search(r"labelling 2,048 tokens with the teacher: row 8 of 64, [\d.]+ m?s left", said)
    assert "training the control (random mask) of" in said
    assert said.count("best of 3 learning rates: ") == 1
    names = {path.stem for path in (tmp_path / "run").glob("cells/*-*")}
    assert not [line for line in lines[:-1] for name in names if name in line]


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == 1
    assert rank_correlation([1, 2, 3], [30, 20, 10]) == -1
    assert rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
