"""`herd tune language` end to end on a tiny model with SmolLM2's vocabulary, and its new rows."""

import json
import random

import pytest
import torch

from herd import checkpoint
from herd.checkpoint import load_tokenizer
from herd.cli import run
from herd.data.builtin import parallel_lines
from herd.evals.windows import from_texts
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.llama.new_rows import train_new_rows
from herd.text import Tokenizer

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=64)
PHRASES = "設定ファイル を編集して ください。 システムの 管理者は パッケージ をインストール する必要があります。".split()


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_change_and_the_forward_is_the_same(tied):
    plain = LlamaLM(CONFIG.replace(tie_embeddings=tied)).init_weights(0).requires_grad_(False)
    model = LlamaLM(CONFIG.replace(tie_embeddings=tied)).init_weights(0).requires_grad_(False)
    train_new_rows(model, 6)
    tokens = torch.arange(80, 96)[None]
    assert torch.equal(model.logits(tokens), plain.logits(tokens))
    model.logits(tokens).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == (1 if tied else 2)
    assert all(name.endswith("new_rows") for name in trained)
    assert all(p.grad is not None and p.shape == (6, 32) for p in model.parameters() if p.requires_grad)


def test_a_language_is_learned_and_reported(real_data, tmp_path, capsys):
    tokenizer = load_tokenizer(real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config = CONFIG.replace(vocab_size=tokenizer.vocab_size, tie_embeddings=True, max_context=512)
    checkpoint.save_model(tmp_path / "base", LlamaLM(config).init_weights(0), tokenizer)
    rng = random.Random(0)
    text = tmp_path / "ja.txt"
    text.write_text("\n".join("".join(rng.choices(PHRASES, k=20)) for _ in range(500)), encoding="utf-8")
    words = ["--model", str(tmp_path / "base"), "--text", str(text), "--out", str(tmp_path / "out")]
    words += ["--add", "200", "--tokens", "8192", "--lr", "1e-2", "--rank", "4"]
    assert run(["tune", "language", "ja", *words]) == 0
    said = capsys.readouterr().out
    assert "bytes per token" in said
    assert "text: ja, bits/byte" in said
    assert "text: en, bits/byte" in said
    report = json.loads((tmp_path / "out" / "language.json").read_text())
    replayed = {
        json.loads(row)["text"] for row in (tmp_path / "out" / "replay.jsonl").read_text().splitlines()
    }
    for code in ("en", "hi", "th"):
        measured = from_texts(parallel_lines(code), tokenizer, max_bytes=6_000)
        of_report = json.loads((tmp_path / "out" / "before.json").read_text())[code]["n_bytes"]
        assert of_report == [document.n_bytes for document in measured]
        assert replayed & {*parallel_lines(code)}
        assert not replayed & {*parallel_lines(code)[: len(measured)]}
    assert report["fertility"]["after"] > 2 * report["fertility"]["before"]
    found = report["bits_per_byte"]["ja"]
    assert found["after"] < 0.8 * found["before"]
    assert found["lo"] <= found["after"] - found["before"] <= found["hi"] < 0
    model = checkpoint.load_model(tmp_path / "out" / "run" / "model")
    new = checkpoint.load_tokenizer(tmp_path / "out" / "run" / "model")
    assert model.config.vocab_size == new.vocab_size == tokenizer.vocab_size + report["fertility"]["added"]
    base = checkpoint.load_model(tmp_path / "base")
    old_rows = model.model.embed_tokens.weight[: tokenizer.vocab_size].detach()
    assert torch.equal(old_rows, base.model.embed_tokens.weight.bfloat16().detach())
    text.write_text(text.read_text(encoding="utf-8") + "追加", encoding="utf-8")
    assert run(["tune", "language", "ja", *words]) == 1
    assert "ja.txt has other content" in capsys.readouterr().err


def test_a_check_measures_fertility_without_weights_and_writes_nothing(tmp_path, capsys):
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 50], 520)
    config = CONFIG.replace(vocab_size=520)
    checkpoint.save_model(tmp_path / "base", LlamaLM(config).init_weights(0), tokenizer)
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "ja.txt").write_text("\n".join("".join(PHRASES) + f"{n}" for n in range(900)))
    words = ["--model", str(tmp_path / "base"), "--text", str(tmp_path / "ja.txt"), "--add", "50"]
    assert run(["tune", "language", "ja", *words, "--out", str(tmp_path / "out"), "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["added"] == 50
    assert found["after"] > 2 * found["before"]
    assert not (tmp_path / "out").exists()


def test_languages_that_are_not_replayed_are_named_before_training(tmp_path, capsys):
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 50], 520)
    config = CONFIG.replace(vocab_size=520, max_context=512)
    checkpoint.save_model(tmp_path / "base", LlamaLM(config).init_weights(0), tokenizer)
    (tmp_path / "ja.txt").write_text("\n".join("".join(PHRASES) + f"{n}" for n in range(900)))
    for code in ("en", "de"):
        rows = [{"text": "\n".join(parallel_lines(code)[n : n + 20])} for n in range(0, 300, 20)]
        (tmp_path / f"{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["tune", "language", "ja", "--model", str(tmp_path / "base"), "--text", str(tmp_path / "ja.txt")]
    replay = ["--replay", str(tmp_path / "en.jsonl"), "--replay", str(tmp_path / "de.jsonl")]
    line = "no text of --replay in French, Italian, Portuguese, Hindi, Spanish, Thai: what"
    assert run([*words, *replay, "--check"]) == 0
    assert line in capsys.readouterr().out
    assert run([*words, "--check"]) == 0
    assert "the replay has text in every language" in capsys.readouterr().out
    assert (
        run([*words, *replay, "--add", "6", "--rank", "4", "--tokens", "1", "--out", str(tmp_path / "out")])
        == 0
    )
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--replay-share", "0"), ("--lr", "-1")])
def test_impossible_options_are_refused_by_name(tmp_path, capsys, option):
    words = ["tune", "language", "ja", "--text", "x", "--out", str(tmp_path / "out"), *option]
    assert run(words) != 0
    assert option[0] in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")
def test_other_options_are_free_until_training_and_rows_of_others_are_not_used(tmp_path, capsys):
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 50], 520)
    config = CONFIG.replace(vocab_size=520, max_context=512)
    checkpoint.save_model(tmp_path / "base", LlamaLM(config).init_weights(0), tokenizer)
    (tmp_path / "ja.txt").write_text("\n".join("".join(PHRASES) + f"{n}" for n in range(900)))
    words = ["tune", "language", "ja", "--model", str(tmp_path / "base"), "--text", str(tmp_path / "ja.txt")]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.jsonl").write_text('{"text": "mine"}\n')
    assert run([*words, "--out", str(mine)]) == 1
    assert f"{mine / 'train.jsonl'}: is there already" in capsys.readouterr().err
    assert run([*words, "--out", str(tmp_path / "out"), "--add", "5", "--rank", "4096"]) == 1
    assert "choose at most 32" in capsys.readouterr().err
    more = ["--add", "6", "--rank", "4", "--tokens", "1", "--out", str(tmp_path / "out")]
    assert run([*words, *more]) == 0
    assert json.loads((tmp_path / "out" / "fertility.json").read_text())["added"] == 6


def test_a_code_of_a_language_is_no_path(tmp_path, capsys):
    assert run(["tune", "language", "../ja", "--text", "x"]) == 1
    assert "'../ja' is no code of a language" in capsys.readouterr().err


def test_text_that_cannot_be_used_leaves_no_folder(tmp_path, capsys):
    words = ["--text", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "out")]
    assert run(["tune", "language", "ja", *words]) == 1
    assert "missing.txt: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
