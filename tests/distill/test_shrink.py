"""A whole shrink run on a toy: budget met, ledger true, resumable cell by cell, bad steps flagged."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from herd import cli
from herd.checkpoint import Lineage, load_config, load_lineage, load_model, load_tokenizer, save_model
from herd.checkpoint.adapters import save_adapter
from herd.data.shards import Shards
from herd.data.stream import TokenStream
from herd.distill import cells, own_words
from herd.distill.cells import ShrinkSettings
from herd.distill.forecast import forecast
from herd.distill.shrink import Shrinker, rank_correlation
from herd.errors import ConfigError
from herd.llama import ModelConfig
from herd.llama.lora import add_lora
from herd.llama.model import LlamaLM
from herd.text import Tokenizer
from herd.train import TrainConfig, lm, train

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "then",
    "runs",
    "away",
    "from",
    "every",
    "cat",
    "in",
    "town",
    "because",
    "it",
    "can",
]


def words(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=12)) + "." for _ in range(n))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A teacher that knows which words follow a space, its text, and held-out text."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "train.txt").write_text(words(0, 1500))
    (folder / "heldout.txt").write_text(words(1, 400))
    tokenizer = Tokenizer.train([words(0, 1500)], 512 + 60)
    config = ModelConfig(
        tokenizer.vocab_size, 32, 4, 4, 2, 64, head_dim=8, max_context=1024, tie_embeddings=True
    )
    model = LlamaLM(config).init_weights(0, std=0.1)
    shards = Shards.write(folder / "shards", [words(0, 1500)], tokenizer)
    learn = TrainConfig(steps=80, batch_size=16, context=32, optimizer={"lr": 1e-2})  # type: ignore[arg-type]
    train(model, TokenStream(shards, 32, 0), lm, learn, folder / "teacher-run")
    lineage = Lineage(name="Llama-toy", stage="base", licence="Llama 3.1 Community License")
    save_model(folder / "teacher", model, tokenizer, lineage=lineage)
    return folder


def settings(toy: Path, **changes) -> ShrinkSettings:
    fields = {
        "model": str(toy / "teacher"), "text": (str(toy / "train.txt"),), "heldout": (str(toy / "heldout.txt"),),
        "to": "params=36k", "tokens": 4096, "race_tokens": 1024, "arms": 2, "context": 32, "batch_size": 4, "lr": 1e-3,
        "heldout_tokens": 3000,
    }  # fmt: skip
    return ShrinkSettings(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    lines: list[str] = []
    shrinker = Shrinker(out, settings(toy, vocab=(572, 540)), lines.append)
    return out, shrinker.run(), lines, shrinker


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
    from transformers import AutoModelForCausalLM

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
    from herd.train.recipe import read_recipe

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
    Shrinker(tmp_path / "own", own).shop.teacher_hash  # noqa: B018 -- a cell, after which the settings are stored
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


def test_a_label_folder_that_an_interruption_left_empty_is_used(toy, tmp_path):
    (tmp_path / "run" / "targets-572").mkdir(parents=True)
    words = [str(toy / "teacher"), "--text", str(toy / "train.txt"), "--tokens", "256", "--context", "32"]
    assert cli.run(["shrink", "label", *words, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "targets-572" / "targets.json").exists()


def test_an_interrupted_run_ends_with_the_same_weights(done, toy, tmp_path):
    whole, shrunk, _, _ = done
    code = (
        "import sys; sys.path.insert(0, {!r}); from test_shrink import *; "
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


def test_a_learning_rate_that_is_too_high_is_flagged_and_fails(toy, tmp_path, capfd):
    words = ["shrink", str(toy / "teacher"), "--to", "params=36k", "--text", str(toy / "train.txt")]
    words += ["--heldout", str(toy / "heldout.txt"), "--tokens", "1024", "--race-tokens", "0", "--arms", "1"]
    words += ["--context", "32", "--heldout-tokens", "3000", "--dtype", "fp32"]
    assert cli.run([*words, "--lr", "0.3", "--out", str(tmp_path / "bad")]) == 1
    assert "WORSE" in capfd.readouterr().out
    assert json.loads((tmp_path / "bad" / "ledger.json").read_text())["worse"]
    assert cli.run([*words, "--lr", "0.001", "--out", str(tmp_path / "good")]) == 0


def test_what_is_done_is_said_in_words_with_the_time_left(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "SILENCE", (0.0, 0.0))
    lines: list[str] = []
    chosen = settings(toy, race_tokens=384, tokens=512, lr=None, sweep_tokens=256, vocab=(572, 540))
    Shrinker(tmp_path / "run", chosen, lines.append).run()
    students = {"2 layers and 2 heads", "2 layers and a vocabulary of 540"}
    said = "\n".join(lines)
    for of in students:
        assert re.search(
            rf"training the student of {of} on 384 tokens: step 2 of 3, loss [\d.]+, [\d.]+.s left", said
        )
    assert re.search(r"labelling 2,048 tokens with the teacher: row 8 of 64, [\d.]+.s left", said)
    assert "training the control (random mask) of" in said
    assert said.count("best of 3 learning rates: ") == 1
    names = {path.stem for path in (tmp_path / "run").glob("cells/*-*")}
    assert not [line for line in lines[:-1] for name in names if name in line]


def test_the_learning_rate_is_the_best_of_a_sweep(toy, tmp_path):
    lines: list[str] = []
    shrinker = Shrinker(
        tmp_path / "run", settings(toy, lr=None, sweep_tokens=256, race_tokens=0, tokens=512), lines.append
    )
    done = shrinker.run()
    bits = {}
    for path in (tmp_path / "run" / "cells").glob("*-run-256-lr*.json"):
        quality = json.loads(path.read_text())["quality"]
        bits[float(path.stem.split("-lr")[1])] = sum(quality["bits"])
    assert len(bits) == 3
    best = min(bits, key=bits.__getitem__)
    assert shrinker.shop.rate_factor * 0.1 / shrinker.shapes[0].config.dim == pytest.approx(best, rel=1e-4)
    recipe = next(tmp_path.glob("run/arms/*/recipe-512-*.yaml")).read_text()
    assert f"lr: {best:g}"[:8] in recipe
    assert "learning rate" in done.ledger["facts"]


def test_only_the_vocabulary_can_be_cut(toy, tmp_path):
    done = Shrinker(tmp_path / "run", settings(toy, to=None, vocab=(540,), tokens=1024, gguf="q8")).run()
    assert load_config(done.folder).n_layers == 4
    assert load_tokenizer(done.folder).vocab_size == 540
    assert [step["name"] for step in done.ledger["steps"]] == [
        "teacher",
        "v540, start",
        "v540, 1,024 tokens",
        "v540, q8",
    ]
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


def test_the_parts_can_be_used_alone(toy, tmp_path, capfd):
    common = [
        str(toy / "teacher"),
        "--text",
        str(toy / "train.txt"),
        "--heldout",
        str(toy / "heldout.txt"),
        "--context",
        "32",
        "--dtype",
        "fp32",
        "--json",
    ]
    assert cli.run(["shrink", "score", *common, "--drop", "1", "--out", str(tmp_path / "score")]) == 0
    scores = json.loads(capfd.readouterr().out)
    assert len(scores["neurons_LF"]) == 4
    assert scores["layers_to_drop"] in ([1], [2])
    prune = [
        "shrink",
        "prune",
        *common,
        "--layers",
        "3",
        "--ffn",
        "48",
        "--heldout-tokens",
        "1000",
        "--out",
        str(tmp_path / "prune"),
    ]
    assert cli.run(prune) == 0
    assert load_config(json.loads(capfd.readouterr().out)["folder"]).ffn_dim == 48
    assert (
        cli.run(
            [
                "shrink",
                "label",
                *common,
                "--tokens",
                "2048",
                "--vocab",
                "540",
                "--out",
                str(tmp_path / "label"),
            ]
        )
        == 0
    )
    assert json.loads(capfd.readouterr().out)["tokens"] >= 2048
    race = [
        *common,
        "--to",
        "params=36k",
        "--race-tokens",
        "256",
        "--sweep-tokens",
        "384",
        "--arms",
        "2",
        "--heldout-tokens",
        "1000",
        "--out",
        str(tmp_path / "race"),
    ]
    assert cli.run(["shrink", "race", *race]) == 0
    assert len(json.loads(capfd.readouterr().out)["arms"]) >= 3


def test_a_dry_run_trains_nothing(toy, tmp_path, capfd):
    words = [
        str(toy / "teacher"),
        "--text",
        str(toy / "train.txt"),
        "--to",
        "params=36k",
        "--context",
        "32",
        "--dtype",
        "fp32",
        "--dry-run",
        "--json",
    ]
    assert cli.run(["shrink", *words, "--out", str(tmp_path / "run")]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["seconds"] > 0
    assert not (tmp_path / "run").exists()
    assert cli.run(["shrink", *words, "--self", "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capfd.readouterr().out)["seconds"] > 0
    own = [word for word in words if word not in ("--text", str(toy / "train.txt"))]
    assert cli.run(["shrink", *own, "--self"]) == 1
    assert "give --text too" in capfd.readouterr().err


def test_other_settings_are_free_until_more_than_a_probe_is_done(toy, tmp_path, capfd):
    words = [
        "shrink",
        str(toy / "teacher"),
        "--text",
        str(toy / "train.txt"),
        "--heldout",
        str(toy / "heldout.txt"),
    ]
    words += ["--context", "32", "--out", str(tmp_path / "run"), "--dtype", "fp32"]
    assert cli.run([*words, "--vocab", "5"]) == 1
    assert "a vocabulary of 5 has no room" in capfd.readouterr().err
    assert cli.run([*words, "--vocab", "540", "--tokens", "256", "--sweep-tokens", "0"]) in (0, 1)
    assert "distilled" in (tmp_path / "run" / "ledger.json").read_text()
    assert cli.run([*words, "--vocab", "540", "--seed", "1"]) == 1
    assert "was begun with" in capfd.readouterr().err


def test_models_and_files_of_others_are_kept(toy, tmp_path, capfd):
    own = shutil.copytree(toy / "teacher", tmp_path / "model")
    before = (own / "model.safetensors").read_bytes()
    words = ["--to", "params=36k", "--text", str(toy / "train.txt"), "--context", "32"]
    assert cli.run(["shrink", str(own), *words, "--out", str(tmp_path)]) == 1
    assert f"{own}: is there already" in capfd.readouterr().err
    assert (own / "model.safetensors").read_bytes() == before
    save_adapter(tmp_path / "adapter", add_lora(load_model(own), 4, 1.0), str(own))
    assert cli.run(["shrink", str(tmp_path / "adapter"), *words, "--out", str(tmp_path / "run")]) == 1
    assert "herd shrink needs a whole model; merge it first" in capfd.readouterr().err


def test_held_out_text_that_is_trained_on_is_refused_before_anything_is_done(toy, tmp_path, capfd):
    shutil.copy(toy / "heldout.txt", tmp_path / "copy.txt")
    words = [
        "shrink",
        str(toy / "teacher"),
        "--to",
        "params=36k",
        "--context",
        "32",
        "--heldout",
        str(toy / "heldout.txt"),
    ]
    for file, how in (
        (toy / "heldout.txt", "is the same file"),
        (tmp_path / "copy.txt", "has the same content"),
    ):
        own = ["--text", str(toy / "train.txt"), "--text", str(file.parent / "*.txt")]
        assert cli.run([*words, *own, "--out", str(tmp_path / "run")]) == 1
        said = capfd.readouterr().err
        assert said.startswith(
            f"error: {toy / 'heldout.txt'}: is held out, but {file} is trained on and {how};"
        )
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, message", [
    (["--to", "95M", "--text", "T"], "write params=95M"), (["--to", "params=36k"], "nothing to train on"),
    (["--text", "T"], "give --to BUDGET"), (["--to", "params=1k", "--text", "T"], "shrink twice"),
    (["--to", "params=36k", "--text", "T", "--context", "4096"], "exceeds the teacher"),
    (["--to", "params=36k", "--text", "T", "--dtype", "int4"], "--dtype"),
    (["--to", "params=36k", "--text", "T", "--gguf", "q77"], "q77"),
    (["--to", "params=10B", "--text", "T"], "meets this budget as it is"),
    (["--to", "params=36k", "--text", "T", "--vocab", "999"], "--vocab 999 exceeds the teacher's"),
    (["--to", "params=36k", "--text", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--to", "params=36k", "--text", "T", "--out", "T"], "T/shrink.json: cannot write"),
])  # fmt: skip
def test_mistakes_are_one_line(toy, tmp_path, capfd, words, message):
    out = [] if "--out" in words else ["--out", str(tmp_path / "run")]
    words = [str(toy / "train.txt") if word == "T" else word for word in words]
    words = ["shrink", str(toy / "teacher"), "--context", "32", *words, *out]
    assert cli.run(words) in (1, 2)
    assert not (tmp_path / "run" / "shrink.json").exists()
    said = capfd.readouterr().err
    assert message.removeprefix("T") in said
    assert "Traceback" not in said


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == 1
    assert rank_correlation([1, 2, 3], [30, 20, 10]) == -1
    assert rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)


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
    written, source = (
        tmp_path / "run" / "model-q4",
        tmp_path / "run" / "arms" / "v540" / "run-512-lr0.001-q4-2048-lr0.001" / "model",
    )
    ids = torch.tensor([load_tokenizer(written).encode("the quick brown fox")])
    assert torch.equal(load_model(written).logits(ids), load_model(source).logits(ids))
    assert load_lineage(written).name.startswith("Llama-toy-")
    assert load_lineage(written).licence == "Llama 3.1 Community License"
    recipe = next(tmp_path.glob("run/arms/*/recipe-512-*-q4-2048-*.yaml")).read_text()
    assert "to: q4" in recipe
    for name in ("teacher", "v540, start", "v540, 512 tokens", trained["name"]):
        assert set(steps[name]["scores"]) == {"copying", "look-up", "boolq"}, name
    assert "look-up" in (tmp_path / "run" / "ledger.html").read_text()
    before = (written / "model.gguf").stat().st_mtime_ns
    assert Shrinker(tmp_path / "run", chosen).run().ledger["steps"] == done.ledger["steps"]
    assert before


def test_the_bytes_of_a_run_are_predicted(toy, tmp_path):
    def written() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    run = Shrinker(tmp_path / "run", settings(toy, to=None, vocab=(540,), gguf="q4", qad_tokens=512))
    predicted = sum(cell.nbytes for cell in forecast(run))
    before = written()
    run.run()
    assert written() - before == pytest.approx(predicted, rel=0.02)


def test_only_the_format_can_change(toy, tmp_path, capfd):
    words = [
        "shrink",
        str(toy / "teacher"),
        "--gguf",
        "q4",
        "--qad-tokens",
        "1024",
        "--text",
        str(toy / "train.txt"),
    ]
    words += [
        "--heldout",
        str(toy / "heldout.txt"),
        "--context",
        "32",
        "--heldout-tokens",
        "2000",
        "--dtype",
        "fp32",
    ]
    assert cli.run([*words, "--json", "--out", str(tmp_path / "run")]) in (0, 1)
    ledger = json.loads(capfd.readouterr().out)["ledger"]
    assert [step["what"] for step in ledger["steps"][1:]] == ["quantized to q4", "distilled in q4"]
    assert load_config(tmp_path / "run" / "model-q4") == load_config(toy / "teacher")


def test_the_teacher_can_be_corrected_on_the_text(toy, tmp_path):
    done = Shrinker(
        tmp_path / "run", settings(toy, to=None, vocab=(540,), tokens=512, correct_tokens=1024)
    ).run()
    corrected = tmp_path / "run" / "teacher" / "model"
    assert load_config(corrected) == load_config(toy / "teacher")
    spec = json.loads((tmp_path / "run" / "targets-540" / "targets.json").read_text())
    cell = json.loads((tmp_path / "run" / "cells" / "teacher-corrected.json").read_text())
    assert cell["hash"] in json.dumps(spec)
    assert cell["tokens"] == 1024
    assert "1,024" in done.ledger["facts"]["teacher corrected"]


@pytest.mark.parametrize("words, message", [
    (["--qad-tokens", "100"], "give --gguf"), (["--task", "boolqq"], "boolqq"), (["--task-data", "nowhere"], "nowhere"),
])  # fmt: skip
def test_mistakes_of_quantizing_and_scoring_are_one_line(toy, tmp_path, capfd, words, message):
    common = [
        "shrink",
        str(toy / "teacher"),
        "--text",
        str(toy / "train.txt"),
        "--context",
        "32",
        "--to",
        "params=36k",
    ]
    assert cli.run([*common, *words, "--out", str(tmp_path / "run")]) in (1, 2)
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
