"""What a shrink run can be asked for: a sweep of rates, only a vocabulary, memory, formats, the teacher's own text."""

from __future__ import annotations

import json

import pytest
import torch
from toy_shrink import settings

from herd.checkpoint import load_config, load_lineage, load_model, load_tokenizer
from herd.distill import own_words
from herd.distill.forecast import forecast
from herd.distill.shrink import Shrinker


def test_the_learning_rate_is_the_best_of_a_sweep(toy, tmp_path):
    lines: list[str] = []
    chosen = settings(toy, lr=None, sweep_tokens=256, race_tokens=0, tokens=512)
    shrinker = Shrinker(tmp_path / "run", chosen, lines.append)
    done = shrinker.run()
    bits = {}
    for path in (tmp_path / "run" / "cells").glob("*-run-256-lr*.json"):
        quality = json.loads(path.read_text())["quality"]
        bits[float(path.stem.split("-lr")[1])] = sum(quality["bits"])
    assert len(bits) == 3
    best = min(bits, key=bits.__getitem__)
    assert shrinker.pipeline.rate_factor * 0.1 / shrinker.shapes[0].config.dim == pytest.approx(
        best, rel=1e-4
    )
    recipe = next(tmp_path.glob("run/arms/*/recipe-512-*.yaml")).read_text()
    assert f"lr: {best:g}"[:8] in recipe
    assert "learning rate" in done.ledger["facts"]


def test_only_the_vocabulary_can_be_cut(toy, tmp_path):
    done = Shrinker(tmp_path / "run", settings(toy, to=None, vocab=(540,), tokens=1024, gguf="q8")).run()
    assert load_config(done.folder).n_layers == 4
    assert load_tokenizer(done.folder).vocab_size == 540
    steps = [step["name"] for step in done.ledger["steps"]]
    assert steps == ["teacher", "v540, start", "v540, 1,024 tokens", "v540, q8"]
    assert load_config(tmp_path / "run" / "model-q8").vocab_size == 540


def test_a_budget_of_memory_is_met_with_quantized_weights_and_may_leave_the_teacher_whole(toy, tmp_path):
    chosen = settings(toy, to="memory=105kB,context=64", race_tokens=512, tokens=512, arms=2)
    shrinker = Shrinker(tmp_path / "run", chosen)
    assert {shape.weights for shape in shrinker.shapes} & {"Q8_0", "Q4_K_M", "Q4_0"}
    done = shrinker.run()
    assert "cache, 64 tokens" in done.ledger["facts"]["run with"]
    quantized = done.ledger["steps"][-1]
    assert quantized["name"].endswith(("Q8_0", "Q4_K_M", "Q4_0"))
    assert quantized["kl"]["value"] > 0


def test_the_teacher_can_write_the_text(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(own_words, "AT_ONCE", 4)
    monkeypatch.setattr(own_words, "ANSWERED", 64)
    chosen = settings(toy, to=None, vocab=(540,), tokens=512, text=(), own_text=True)
    done = Shrinker(tmp_path / "run", chosen).run()
    assert list(tmp_path.glob("run/own/*.jsonl"))
    assert done.ledger["steps"][-1]["tokens"] == 512


def test_the_teacher_can_be_corrected_on_the_text(toy, tmp_path):
    chosen = settings(toy, to=None, vocab=(540,), tokens=512, correct_tokens=1024)
    done = Shrinker(tmp_path / "run", chosen).run()
    corrected = tmp_path / "run" / "teacher" / "model"
    assert load_config(corrected) == load_config(toy / "teacher")
    spec = json.loads((tmp_path / "run" / "targets-540" / "targets.json").read_text())
    cell = json.loads((tmp_path / "run" / "cells" / "teacher-corrected.json").read_text())
    assert cell["hash"] in json.dumps(spec)
    assert cell["tokens"] == 1024
    assert "1,024" in done.ledger["facts"]["teacher corrected"]


def test_a_student_is_distilled_in_the_format_that_it_is_written_in(toy, tmp_path):
    chosen = settings(
        toy, to=None, vocab=(540,), tokens=512, gguf="q4", qad_tokens=2048, tasks=("boolq",), task_limit=4
    )
    done = Shrinker(tmp_path / "run", chosen).run()
    steps = {step["name"]: step for step in done.ledger["steps"]}
    plain, trained = steps["v540, q4"], steps["v540, q4, 2,048 tokens"]
    assert trained["tokens"] == 2048
    assert trained["nbytes"] == plain["nbytes"]
    assert trained["kl"]["value"] < plain["kl"]["value"]
    assert "v540, q4" in trained["minus"]
    written = tmp_path / "run" / "model-q4"
    source = tmp_path / "run" / "arms" / "v540" / "run-512-lr0.001-q4-2048-lr0.001" / "model"
    ids = torch.tensor([load_tokenizer(written).encode("the quick brown fox")])
    assert torch.equal(load_model(written).logits(ids), load_model(source).logits(ids))
    assert load_lineage(written).name.startswith("Llama-toy-")
    assert load_lineage(written).licence == "Llama 3.1 Community License"
    recipe = next(tmp_path.glob("run/arms/*/recipe-512-*-q4-2048-*.yaml")).read_text()
    assert "to: q4" in recipe
    for name in ("teacher", "v540, start", "v540, 512 tokens", trained["name"]):
        assert set(steps[name]["scores"]) == {"copying", "look-up", "boolq"}, name
    assert "look-up" in (tmp_path / "run" / "ledger.html").read_text()
    before = (written / "model.gguf").read_bytes()
    assert Shrinker(tmp_path / "run", chosen).run().ledger["steps"] == done.ledger["steps"]
    assert (written / "model.gguf").read_bytes() == before


def test_the_bytes_of_a_run_are_predicted(toy, tmp_path):
    def written() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    run = Shrinker(tmp_path / "run", settings(toy, to=None, vocab=(540,), gguf="q4", qad_tokens=512))
    predicted = sum(cell.nbytes for cell in forecast(run))
    before = written()
    run.run()
    assert written() - before == pytest.approx(predicted, rel=0.02)
