"""`herd shrink`: its parts, a dry run, files that are kept, and mistakes in one line."""

from __future__ import annotations

import json
import shutil

import pytest

from herd import cli
from herd.checkpoint import load_config, load_model
from herd.checkpoint.adapters import save_adapter
from herd.llama.lora import add_lora

TEACHER, TEXTS = (
    "{toy}/teacher --context 32 --dtype fp32",
    "--text {toy}/train.txt --heldout {toy}/heldout.txt",
)


@pytest.fixture
def shrink(toy, tmp_path, capfd):
    """Run `herd shrink`, where {toy} and {tmp} are folders. Returns its exit code, stdout and stderr."""

    def run(words: str) -> tuple[int, str, str]:
        code = cli.run(["shrink", *words.format(toy=toy, tmp=tmp_path).split()])
        return code, *capfd.readouterr()

    return run


def test_the_parts_can_be_used_alone(shrink):
    def said(part: str, words: str) -> dict:
        code, out, _ = shrink(f"{part} {TEACHER} {TEXTS} {words} --json --out {{tmp}}/{part}")
        assert code == 0
        return json.loads(out)

    scores = said("score", "--drop 1")
    assert len(scores["neurons_LF"]) == 4
    assert scores["layers_to_drop"] in ([1], [2])
    pruned = said("prune", "--layers 3 --ffn 48 --heldout-tokens 1000")
    assert load_config(pruned["folder"]).ffn_dim == 48
    assert said("label", "--tokens 2048 --vocab 540")["tokens"] >= 2048
    budget = "--to params=36k --race-tokens 256 --sweep-tokens 384 --arms 2 --heldout-tokens 1000"
    assert len(said("race", budget)["arms"]) >= 3


def test_a_dry_run_trains_nothing(shrink, tmp_path):
    words = f"{TEACHER} --to params=36k --dry-run --json --out {{tmp}}/run"
    for own in ("", "--self"):
        code, out, _ = shrink(f"{words} --text {{toy}}/train.txt {own}")
        assert code == 0
        assert json.loads(out)["seconds"] > 0
        assert not (tmp_path / "run").exists()
    code, _, err = shrink(f"{words} --self")
    assert code == 1
    assert "give --text too" in err


def test_only_the_format_can_change(shrink, toy, tmp_path):
    words = "--gguf q4 --qad-tokens 1024 --heldout-tokens 2000 --json --out {tmp}/run"
    code, out, _ = shrink(f"{TEACHER} {TEXTS} {words}")
    assert code in (0, 1)
    steps = json.loads(out)["ledger"]["steps"]
    assert [step["what"] for step in steps[1:]] == ["quantized to q4", "distilled in q4"]
    assert load_config(tmp_path / "run" / "model-q4") == load_config(toy / "teacher")


def test_a_learning_rate_that_is_too_high_is_flagged_and_fails(shrink, tmp_path):
    words = f"{TEACHER} {TEXTS} --to params=36k --tokens 1024 --race-tokens 0 --arms 1 --heldout-tokens 3000"
    code, out, _ = shrink(f"{words} --lr 0.3 --out {{tmp}}/bad")
    assert code == 1
    assert "WORSE" in out
    assert json.loads((tmp_path / "bad" / "ledger.json").read_text())["worse"]
    assert shrink(f"{words} --lr 0.001 --out {{tmp}}/good")[0] == 0


def test_a_label_folder_that_an_interruption_left_empty_is_used(shrink, tmp_path):
    (tmp_path / "run" / "targets-572").mkdir(parents=True)
    assert shrink(f"label {TEACHER} --text {{toy}}/train.txt --tokens 256 --out {{tmp}}/run")[0] == 0
    assert (tmp_path / "run" / "targets-572" / "targets.json").exists()


def test_other_settings_are_free_until_more_than_a_probe_is_done(shrink, tmp_path):
    words = f"{TEACHER} {TEXTS} --out {{tmp}}/run"
    code, _, err = shrink(f"{words} --vocab 5")
    assert code == 1
    assert "a vocabulary of 5 has no room" in err
    assert shrink(f"{words} --vocab 540 --tokens 256 --sweep-tokens 0")[0] in (0, 1)
    assert "distilled" in (tmp_path / "run" / "ledger.json").read_text()
    code, _, err = shrink(f"{words} --vocab 540 --seed 1")
    assert code == 1
    assert "was begun with" in err


def test_models_and_files_of_others_are_kept(shrink, toy, tmp_path):
    own = shutil.copytree(toy / "teacher", tmp_path / "model")
    before = (own / "model.safetensors").read_bytes()
    words = "--to params=36k --text {toy}/train.txt --context 32"
    code, _, err = shrink(f"{{tmp}}/model {words} --out {{tmp}}")
    assert code == 1
    assert f"{own}: is there already" in err
    assert (own / "model.safetensors").read_bytes() == before
    save_adapter(tmp_path / "adapter", add_lora(load_model(own), 4, 1.0), str(own))
    code, _, err = shrink(f"{{tmp}}/adapter {words} --out {{tmp}}/run")
    assert code == 1
    assert "herd shrink needs a whole model; merge it first" in err


@pytest.mark.parametrize(
    ("file", "how"), [("{toy}/heldout.txt", "is the same file"), ("{tmp}/copy.txt", "has the same content")]
)
def test_held_out_text_that_is_trained_on_is_refused_before_anything_is_done(
    shrink, toy, tmp_path, file, how
):
    shutil.copy(toy / "heldout.txt", tmp_path / "copy.txt")
    trained = file.rpartition("/")[0] + "/*.txt"
    code, _, err = shrink(f"{TEACHER} {TEXTS} --text {trained} --to params=36k --out {{tmp}}/run")
    assert code == 1
    file = file.format(toy=toy, tmp=tmp_path)
    assert err.startswith(f"error: {toy}/heldout.txt: is held out, but {file} is trained on and {how};")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "message"), [
    ("--to 95M TEXT", "write params=95M"), ("--to params=36k", "nothing to train on"),
    ("TEXT", "give --to BUDGET"), ("--to params=1k TEXT", "shrink twice"),
    ("--to params=36k TEXT --context 4096", "exceeds the teacher"),
    ("--to params=36k TEXT --dtype int4", "--dtype"), ("--to params=36k TEXT --gguf q77", "q77"),
    ("--to params=10B TEXT", "meets this budget as it is"),
    ("--to params=36k TEXT --vocab 999", "--vocab 999 exceeds the teacher's"),
    ("--to params=36k --text nowhere.txt", "nowhere.txt: no such file"),
    ("--to params=36k TEXT --out {toy}/train.txt", "train.txt/shrink.json: cannot write"),
    ("--to params=36k TEXT --qad-tokens 100", "give --gguf"), ("--to params=36k TEXT --task boolqq", "boolqq"),
    ("--to params=36k TEXT --task-data nowhere", "nowhere"),
])  # fmt: skip
def test_mistakes_are_one_line(shrink, tmp_path, words, message):
    words = words.replace("TEXT", "--text {toy}/train.txt")
    code, _, err = shrink(f"{{toy}}/teacher --context 32 --out {{tmp}}/run {words}")
    assert code in (1, 2)
    assert not (tmp_path / "run" / "shrink.json").exists()
    assert message in err
    assert "Traceback" not in err
