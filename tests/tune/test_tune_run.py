"""`herd tune` from a file of dialogs to the comparison, with adapters and without, resumed, and refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from herd import checkpoint
from herd.cli import run
from herd.errors import ChatError
from herd.llama.config import ModelConfig
from herd.llama.lora import lora_layers
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.train import run as train_run
from herd.tune import run as tune_run

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")


def tune(*words: object, code: int = 0) -> None:
    assert run(["tune", *map(str, words)]) == code


def other(tmp_path):
    file = tmp_path / "other.txt"
    file.write_text("The cat is red and the dog is blue. " * 20)
    return file


def test_a_full_tuning_shows_the_screen_and_compares(base, dialogs, tmp_path, capsys):
    out = tmp_path / "run"
    tune(base, "--data", dialogs, "--out", out, "--steps", 6, "--lr", "3e-3", "--other", other(tmp_path))
    said = capsys.readouterr().out
    assert "37 messages" in said
    assert "3 rows" in said
    assert f"{dialogs}:12: not JSON" in said
    assert f"{dialogs}:20: none of its tokens is trained" in said
    assert f"{dialogs}:31: a prompt without an answer" in said
    assert "full: 131 k parameters are below 500 M" in said
    assert "tokens/s" in said
    changes = {change["name"]: change for change in json.loads((out / "changes.json").read_text())}
    assert changes["held-out loss"]["after"] < changes["held-out loss"]["before"] - 0.5
    assert changes.keys() == {"held-out loss", "text: other"}
    assert checkpoint.load_model(out / "model").dtype == torch.bfloat16
    recipe = (out / "recipe.yaml").read_text()
    assert "kind: tuning" in recipe


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_on_a_gguf(base, dialogs, tmp_path, capsys, method):
    checkpoint.quantize_folder(checkpoint.open_source(base), tmp_path / "q8", scheme("q8"))
    file, out = tmp_path / "q8" / "model.gguf", tmp_path / "run"
    more = ("--steps", 6, "--rank", 4, "--lr", "1e-2", "--other", other(tmp_path), "--json")
    tune(file, "--data", dialogs, "--out", out, "--method", method, *more)
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == str(out.resolve() / "adapter")
    loss = next(change for change in result["changes"] if change["name"] == "held-out loss")
    assert loss["after"] < loss["before"] - 0.2
    model = checkpoint.load_model(out / "adapter")
    assert len(lora_layers(model)) == 14


def test_dora_with_rslora_is_trained_written_for_peft_and_merged(base, dialogs, tmp_path, capsys):
    out = tmp_path / "run"
    kinds = ("--dora", "--rslora", "--rank", 4, "--lr", "1e-2", "--steps", 6)
    tune(base, "--data", dialogs, "--out", out, *kinds, code=1)
    assert "--rslora, --dora: only adapters can have this" in (said := capsys.readouterr().err)
    assert "--method lora" in said
    assert not (out / "recipe.yaml").exists()
    words = ("--data", dialogs, "--out", out, "--method", "lora", *kinds, "--other", other(tmp_path))
    tune(base, *words)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"], config["lora_alpha"]) == (True, True, 32)
    tune("merge", out / "adapter", "--to", "fp32", "--out", tmp_path / "merged")
    merged, tuned = checkpoint.load_model(tmp_path / "merged"), checkpoint.load_model(out / "adapter")
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.logits(tokens), tuned.logits(tokens), atol=1e-4, rtol=0)
    tune("merge", out / "adapter", "--to", "gguf-adapter", code=1)
    assert "GGUF adapter has no DoRA" in capsys.readouterr().err


def test_other_options_are_free_until_the_run_begins_and_refused_afterwards(base, dialogs, tmp_path, capsys):
    words = (base, "--data", dialogs, "--out", tmp_path / "run", "--other", other(tmp_path))
    tune(*words, "--check")
    tune(*words, "--steps", 2, "--method", "lora", "--check")
    assert "lora: as asked" in capsys.readouterr().out
    tune(*words, "--steps", 2)
    assert "full: 131 k parameters" in capsys.readouterr().out
    tune(*words, "--steps", 3, code=1)
    assert "has a run with steps=2, not 3" in capsys.readouterr().err


def test_an_interrupted_run_resumes_with_the_same_bits(base, dialogs, tmp_path, monkeypatch, capsys):
    words = ("--data", dialogs, "--steps", 8, "--other", other(tmp_path))
    tune(base, *words, "--out", tmp_path / "whole")

    def interrupted(recipe, *, on_step):
        def stop(record):
            if record["step"] == 5:
                raise KeyboardInterrupt
            on_step(record)

        return train_run.run_recipe(recipe, on_step=stop)

    with monkeypatch.context() as patch:
        patch.setattr(tune_run, "run_recipe", interrupted)
        tune(base, *words, "--out", tmp_path / "parts", code=130)
    capsys.readouterr()
    tune(base, *words, "--out", tmp_path / "parts")
    assert "resuming" in capsys.readouterr().out
    whole, parts = (checkpoint.load_model(tmp_path / name / "model") for name in ("whole", "parts"))
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.soak
def test_a_killed_process_is_started_again_and_ends_with_the_same_bits(base, dialogs, tmp_path):
    """SIGKILL as soon as there is a state, so that training is under way and steps after it are lost."""
    words = ["--data", str(dialogs), "--steps", "40", "--method", "lora", "--rank", "4", "--context", "64"]
    words += ["--other", str(other(tmp_path)), "--out"]
    tune(base, *words, tmp_path / "whole")
    command = [sys.executable, "-m", "herd", "tune", str(base), *words, str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("state/step-*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "adapter").exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    for name in ("adapter/adapter_model.safetensors", "changes.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_edited_data_and_other_options_are_refused_by_name(base, dialogs, tmp_path, capsys):
    words = ("--data", dialogs, "--steps", 2, "--out", tmp_path / "run", "--other", other(tmp_path))
    tune(base, *words)
    tune(base, *words, "--rank", 3, code=1)
    assert "rank=16, not 3" in capsys.readouterr().err
    dialogs.write_text(dialogs.read_text() + dialogs.read_text().splitlines()[0] + "\n")
    tune(base, *words, code=1)
    assert f"{dialogs} has other content" in capsys.readouterr().err


def test_nothing_to_train_is_an_error_with_line_numbers(base, tmp_path, capsys):
    file = tmp_path / "none.jsonl"
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune(base, "--data", file, "--out", tmp_path / "run", code=1)
    said = capsys.readouterr().err
    assert f"no token is trained: {file}:1: none of its tokens" in said
    assert f"{file}:2: a prompt without an answer" in said


def test_dialogs_for_a_model_without_a_chat_template_say_what_to_do(real_data, dialogs, tmp_path, capsys):
    file = real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = checkpoint.load_tokenizer(file).with_settings(chat_template=None)
    config = ModelConfig(tokenizer.vocab_size, 32, 1, 4, 2, 48, max_context=512, tie_embeddings=True)
    checkpoint.save_model(tmp_path / "base", LlamaLM(config).init_weights(0), tokenizer)
    words = (tmp_path / "base", "--data", dialogs, "--out", tmp_path / "run", "--check")
    tune(*words, code=1)
    said = capsys.readouterr().err
    assert (
        f" more: {tmp_path / 'base'}: has no chat template, so dialogs cannot be written; give rows" in said
    )
    assert "instruct version" in said
    assert "chat_template.jinja" in said
    template = checkpoint.load_tokenizer(file).chat_template
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    tune(*words)
    assert "37 messages" in capsys.readouterr().out
    with pytest.raises(ChatError, match=r"herd chat --complete"):
        tokenizer.require_chat()


def test_pairs_are_tuned_by_dpo_and_measured_beside_a_length_baseline(base, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {n}?", "chosen": "It is red.", "rejected": "It is a big blue house."}
        for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--steps", 6, "--lr", "1e-3", "--out", tmp_path / "run", "--other", other(tmp_path))
    tune(base, "--data", file, *words)
    said = capsys.readouterr().out
    assert "30 pair" in said
    assert "dpo, 6 steps" in said
    assert "shorter is right: 100 %" in said
    changes = json.loads((tmp_path / "run" / "changes.json").read_text())
    assert changes[0]["after"] == 1.0


def test_pairs_among_dialogs_and_rows_of_other_files_are_set_aside_aloud(base, dialogs, tmp_path, capsys):
    pairs, held = tmp_path / "pairs.jsonl", tmp_path / "held.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    good = dialogs.read_text().splitlines()[0].replace("What", "Who")
    held.write_text(f"{good}\n{{broken\n")
    words = ("--data", dialogs, "--data", pairs, "--heldout", held, "--out", tmp_path / "run", "--check")
    tune(base, *words)
    said = capsys.readouterr().out
    assert "rows: 37 messages;" in said
    assert f"{pairs}:1: a pair of answers among dialogs" in said
    assert f"{held}:2: not JSON" in said
    tune(base, "--data", pairs, "--replay", dialogs, "--out", tmp_path / "run", "--check", code=1)
    assert "--replay: nothing can be mixed" in capsys.readouterr().err


def test_a_folder_is_read_without_the_files_that_have_no_rows(base, dialogs, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(dialogs.read_text())
    (folder / "b.png").write_bytes(b"\x89PNG\0\0")
    for name in ("c.txt", "d.jsonl", "e.csv", "f.json"):
        (folder / name).write_text("prompt,completion\n" if name == "e.csv" else "")
    tune(base, "--data", folder, "--out", tmp_path / "run", "--check")
    said = capsys.readouterr().out
    assert "37 messages" in said
    assert "8 rows" in said
    for name in ("c.txt", "d.jsonl", "e.csv", "f.json"):
        tune(base, "--data", folder / name, "--out", tmp_path / "run", "--check", code=1)
        assert f"{folder / name}: " in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (("--other", "nowhere.txt"), "nowhere.txt: no such file"), (("--replay", "nowhere.txt"), "nowhere.txt: no such"),
    (("--heldout", "nowhere.txt"), "nowhere.txt: no such"), (("--context", "4096"), "--context 4096 exceeds the 512"),
    (("--method", "lora", "--rank", "100000000"), "B of memory"), (("--replay-share", "1"), "--replay-share"),
    (("--epochs", "1e300"), "--epochs"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_before_the_recipe_is_written(
    base, dialogs, tmp_path, capsys, words, said
):
    tune(base, "--data", dialogs, "--out", tmp_path / "run", *words, "--check", code=1)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_files_that_no_run_has_made_are_not_replaced(base, dialogs, tmp_path, capsys):
    for name, content in (("recipe.yaml", "mine"), ("options.json", '{"teacher": "mine"}')):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text(content)
        tune(base, "--data", dialogs, "--out", out, "--check", code=1)
        assert f"{out / name}: is" in capsys.readouterr().err
        assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == [name]
        assert (out / name).read_text() == content
    tune("inspect", tmp_path / "options.json", code=1)
    assert "is not from herd tune" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_refused_before_the_recipe_is_written(
    base, dialogs, tmp_path, monkeypatch, capsys
):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    file = shutil.copy(dialogs, folder / "rows.jsonl")
    for data, out, said in (
        (file, tmp_path / "run", "--data="),
        (dialogs, folder / "run", "--out="),
        ("rows.jsonl", tmp_path / "run", "data.paths.0="),
    ):
        monkeypatch.chdir(folder)  # the recipe has paths from the root
        tune(base, "--data", data, "--out", out, "--check", code=1)
        line = capsys.readouterr().err
        assert said in line
        assert "caf\\udce9/" in line
        assert "is not UTF-8" in line
        assert not (out / "recipe.yaml").exists()
    tune(base, "--data", dialogs, "--out", "run", "--check", code=1)
    assert "caf\\udce9/run': is not UTF-8; choose another --out" in capsys.readouterr().err


def test_held_out_rows_that_are_among_others_to_train_on_are_named_or_refused(
    base, dialogs, tmp_path, capsys
):
    first, second = dialogs.read_text().splitlines()[:2]
    held = tmp_path / "held.jsonl"
    held.write_text(f"{first}\n{second}\n")
    words = ("--data", dialogs, "--heldout", held, "--out", tmp_path / "run", "--check")
    tune(base, *words, code=1)
    assert f"error: {held}: every row is also in {dialogs}; hold out others" in capsys.readouterr().err
    held.write_text(f"{first}\n{first.replace('What', 'Who')}\n")
    tune(base, *words)
    assert f"note  {held}: held out, and trained on too (1 rows)" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--data", "--replay"])
def test_held_out_rows_that_are_trained_on_are_refused(base, dialogs, tmp_path, capsys, option):
    held = shutil.copy(dialogs, tmp_path / "held.jsonl")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "link.jsonl").symlink_to(held)
    (tmp_path / "first.jsonl").write_text(dialogs.read_text().splitlines()[0])
    words = ("--data", tmp_path / "first.jsonl", "--heldout", held, "--out", tmp_path / "run", "--check")
    for file, how in (
        (tmp_path / "more" / "link.jsonl", "is the same file"),
        (dialogs, "has the same content"),
    ):
        tune(base, *words, option, file.parent if file != dialogs else file, code=1)
        assert f"error: {held}: is held out, but {file} is trained on and {how}" in capsys.readouterr().err


def test_a_run_within_its_data_is_refused(base, dialogs, tmp_path, capsys):
    tune(base, "--data", dialogs.parent, "--out", dialogs.parent / "run", "--check", code=1)
    assert "has the run's own folder" in capsys.readouterr().err


def test_a_second_run_does_not_touch_the_folder_of_the_first(base, dialogs, tmp_path, capsys):
    out = tmp_path / "run"
    with tune_run.lock_run(out):
        tune(base, "--data", dialogs, "--out", out, "--check", code=1)
    assert "is working in this folder" in capsys.readouterr().err
    assert not (out / "recipe.yaml").exists()


def test_a_rate_that_breaks_the_model_is_named_and_a_lower_one_may_follow(base, dialogs, tmp_path, capsys):
    words = ("--data", dialogs, "--steps", 8, "--other", other(tmp_path), "--out", tmp_path / "run")
    tune(base, *words, "--lr", "1e30", code=1)
    assert "start again with a lower lr" in capsys.readouterr().err
    tune(base, *words, "--lr", "1e-3")
    assert "held-out loss" in capsys.readouterr().out
    words = ("--data", dialogs, "--steps", 1, "--other", other(tmp_path), "--out", tmp_path / "last")
    tune(base, *words, "--lr", "1e9", code=1)  # the last update breaks it
    assert "lower" in capsys.readouterr().err


def test_a_task_that_failed_is_named(base, dialogs, tmp_path, monkeypatch):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "What is red?", "answer": "red"}) + "\n")
    monkeypatch.setattr(tune_run, "_task", lambda *a: {"failed": "no time"})
    words = ("--data", dialogs, "--steps", 1, "--other", other(tmp_path), "--out", tmp_path / "run")
    with pytest.warns(UserWarning, match=r"is not compared, because it failed: no time"):
        tune(base, *words, "--tasks", f" {questions}")


def test_replay_is_mixed_in(base, dialogs, tmp_path, capsys):
    words = (
        "--data",
        dialogs,
        "--replay",
        other(tmp_path),
        "--steps",
        2,
        "--out",
        tmp_path / "run",
        "--check",
    )
    tune(base, *words)
    assert "replay_share: 0.2" in (tmp_path / "run" / "recipe.yaml").read_text()
