"""Extending a vocabulary: old texts keep their ids, new text gets fewer tokens, transformers agrees."""

import random

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models

from herd.checkpoint import load_tokenizer
from herd.data.builtin import parallel_lines
from herd.errors import TokenizerError
from herd.text import Tokenizer
from herd.text.extend import extend_vocabulary
from herd.text.library_tokenizer import LibraryTokenizer
from herd.text.tokenizer_json import tokenizer_json

PHRASES = "設定ファイル を編集して ください。 システムの 管理者は パッケージ をインストール する必要があります。".split()


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


@pytest.fixture(params=["ranks", "library"])
def special_last(request, tmp_path):
    """A tokenizer whose special tokens follow its vocabulary: of Llama 3's kind, or of Qwen's."""
    made = Tokenizer.train(["the cat sat on the mat " * 50], 520)
    if request.param == "ranks":
        return made
    library = Library.from_str(tokenizer_json(made.ranks, made.special_tokens, made.bos_id))
    return LibraryTokenizer(library, bos=made.token_names["bos_token"], eos=made.token_names["eos_token"])


def test_special_tokens_that_follow_the_vocabulary_keep_their_ids(special_last, tmp_path):
    transformers = pytest.importorskip("transformers")
    old, extended = special_last, extend_vocabulary(special_last, japanese(50), 40)
    new = extended.tokenizer
    assert new.vocab_size == old.vocab_size + len(extended.pieces) > old.vocab_size
    assert new.special_tokens == old.special_tokens
    assert (new.bos_id, new.eos_id, new.stop_ids) == (old.bos_id, old.eos_id, old.stop_ids)
    english = "The cat sat on <|eot_id|> the mat."
    assert new.encode(english, bos=True, eos=True) == old.encode(english, bos=True, eos=True)
    text = japanese(1, seed=3)[0]
    assert len(new.encode(text)) < 0.6 * len(old.encode(text))
    new.save(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text) == new.encode(text)
    assert theirs.convert_tokens_to_ids("<|eot_id|>") == old.special_tokens["<|eot_id|>"]
    assert new.vocabulary.tokens[old.special_tokens["<|eot_id|>"]] == "<|eot_id|>"


def test_llama_3s_dialogs_keep_every_id_and_mask():
    old = Tokenizer.train(["the cat sat on the mat " * 50], 520)
    new = extend_vocabulary(old, japanese(50), 40).tokenizer
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <|eot_id|>"},
        {"role": "assistant", "content": "Hello"},
    ]
    ours, theirs = (each.require_chat().render(messages) for each in (new, old))
    assert (ours.ids, ours.mask) == (theirs.ids, theirs.mask)


def test_a_vocabulary_that_is_not_byte_level_is_refused():
    characters = LibraryTokenizer(Library(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    with pytest.raises(TokenizerError, match="only byte-level BPE can be extended"):
        extend_vocabulary(characters, japanese(2), 10)
