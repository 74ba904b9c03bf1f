"""Extending a vocabulary: old texts keep their ids, new text gets fewer tokens, transformers agrees."""

from __future__ import annotations

import random

import pytest

from herd.checkpoint import load_tokenizer
from herd.data.builtin import parallel_lines
from herd.errors import TokenizerError
from herd.text import Tokenizer
from herd.text.extend import extend_vocabulary

PHRASES = (
    "設定ファイル",
    "を編集して",
    "ください。",
    "システムの",
    "管理者は",
    "パッケージ",
    "をインストール",
    "する必要があります。",
)


def japanese(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PHRASES, k=6)) + " apt-get update\n" for _ in range(n)]


@pytest.fixture(scope="module")
def old(real_data):
    return load_tokenizer(real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def extended(old):
    return extend_vocabulary(old, japanese(200), 100)


def test_new_tokens_make_new_text_shorter_and_come_back(old, extended):
    new = extended.tokenizer
    assert new.vocab_size == old.vocab_size + len(extended.pieces)
    for text in japanese(20, seed=1):
        ids = new.encode(text)
        assert len(ids) < 0.6 * len(old.encode(text))
        assert new.decode(ids) == text


def test_every_new_token_is_its_old_pieces(old, extended):
    for number, pieces in enumerate(extended.pieces):
        token = extended.tokenizer.token_bytes(old.vocab_size + number)
        assert token == b"".join(old.token_bytes(id_) for id_ in pieces)
        assert all(byte >= 0x80 for byte in token)


def test_old_texts_and_dialogs_keep_every_id(old, extended):
    new = extended.tokenizer
    for lang in ("en", "de", "fr", "es", "it", "pt", "hi", "th"):
        for line in parallel_lines(lang):
            assert new.encode(line) == old.encode(line), lang
    assert new.encode("def f(x):\n    return x ** 2  # ü€\n") == old.encode(
        "def f(x):\n    return x ** 2  # ü€\n"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert new.require_chat().render(messages).ids == old.require_chat().render(messages).ids
    assert new.special_tokens == old.special_tokens
    assert new.stop_ids == old.stop_ids


def test_the_saved_tokenizer_is_read_by_transformers_with_the_same_ids(extended, tmp_path):
    transformers = pytest.importorskip("transformers")
    extended.tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in [*japanese(5, seed=2), "The cat. 123 été"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == extended.tokenizer.encode(text)
        assert ours.encode(text) == extended.tokenizer.encode(text)


def test_a_vocabulary_with_special_tokens_at_its_end_is_refused():
    tokenizer = Tokenizer.train(["ab cd " * 50], 515)
    with pytest.raises(TokenizerError, match="special tokens follow the vocabulary"):
        extend_vocabulary(tokenizer, japanese(2), 10)
