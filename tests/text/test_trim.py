"""Trimmed vocabularies: lossless, and the ids of byte-pair encoding with fewer merges."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from herd.errors import TokenizerError
from herd.text import Tokenizer
from herd.text.library_tokenizer import LibraryTokenizer
from herd.text.pretokenizers import PRE_TOKENIZERS
from herd.text.trim import trim_vocabulary

TEXT = (
    "It was the best of times, it was the worst of times; 1234 naïve café 日本語 🦙\n\n\tdef f(x): return x\r\n"
    * 40
)


def trained(size: int = 400) -> LibraryTokenizer:
    """A byte-level BPE tokenizer like SmolLM2's: special tokens first, digits alone."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = PRE_TOKENIZERS["smollm"].cutter()
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([TEXT], trainer)
    return LibraryTokenizer(library, bos="<|im_start|>", eos="<|im_end|>", unk="<|endoftext|>")


FULL = trained()
SMALL = trim_vocabulary(FULL, 290)


def split_by_hand(tokenizer: LibraryTokenizer, ids: list[int], kept: set[int]) -> list[int]:
    """Undo the merges of dropped tokens, one pair at a time."""
    model = json.loads(tokenizer.to_json())["model"]
    pairs = {
        "".join(pair): pair for pair in (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
    }
    words = {id_: word for word, id_ in model["vocab"].items()}
    out: list[int] = []
    stack = ids[::-1]
    while stack:
        id_ = stack.pop()
        if id_ in kept:
            out.append(id_)
        else:
            stack += [model["vocab"][part] for part in pairs[words[id_]][::-1]]
    return out


@given(st.text(max_size=60))
def test_every_text_comes_back_and_has_the_pieces_of_the_dropped_tokens(text):
    small = SMALL.tokenizer
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert [SMALL.kept[id_] for id_ in ids] == split_by_hand(FULL, FULL.encode(text), set(SMALL.kept))


def test_the_pieces_of_a_dropped_token_are_those_before_its_merges():
    kept = set(SMALL.kept)
    for id_ in range(FULL.vocab_size):
        assert [SMALL.kept[piece] for piece in SMALL.pieces[id_]] == split_by_hand(FULL, [id_], kept)


def test_settings_and_special_tokens_are_carried_over():
    full = FULL.with_settings(stop_ids=[FULL.encode("t")[0]], chat_template="{{ messages }}")
    small = trim_vocabulary(full, 290).tokenizer
    assert small.special_tokens.keys() == FULL.special_tokens.keys()
    assert small.chat_template == "{{ messages }}"
    assert {small.token_bytes(id_) for id_ in small.own_stop_ids} == {b"t", b"<|im_end|>"}
    assert small.decode([small.eos_id]) == "<|im_end|>"
    assert small.vocabulary.pre == "smollm"
    assert small.sha256 != FULL.sha256


def test_the_saved_folder_gives_the_same_ids_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    SMALL.tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXT, add_special_tokens=False) == SMALL.tokenizer.encode(TEXT)
    assert Tokenizer.from_folder(tmp_path).sha256 == SMALL.tokenizer.sha256


def test_llama_3s_kind_keeps_its_class_and_its_special_tokens():
    full = Tokenizer.train([TEXT], 570)
    cut = trim_vocabulary(full, 540)
    assert cut.tokenizer.encode(TEXT) != full.encode(TEXT)
    assert cut.tokenizer.decode(cut.tokenizer.encode(TEXT)) == TEXT
    assert list(cut.tokenizer.special_tokens) == list(full.special_tokens)
    assert cut.tokenizer.bos_id == full.bos_id - 30
    for old, pieces in enumerate(cut.pieces):
        assert full.token_bytes(old) == b"".join(map(cut.tokenizer.token_bytes, pieces))
    assert [full.token_bytes(old) for old in cut.kept] == [cut.tokenizer.token_bytes(n) for n in range(540)]


def test_metas_vocabulary_can_be_halved(real_data):
    full = Tokenizer.from_file(real_data("llama3_tokenizer") / "tokenizer.model")
    cut = trim_vocabulary(full, 65_536)
    text = (real_data("wikitext2") / "test.txt").read_text()[:100_000]
    assert cut.tokenizer.decode(cut.tokenizer.encode(text)) == text
    assert len(cut.tokenizer.encode(text)) < 1.05 * len(full.encode(text))


@pytest.mark.parametrize("full", [FULL, Tokenizer.train([TEXT], 570)], ids=["merges", "ranks"])
def test_a_text_whose_tokens_are_all_kept_has_the_same_tokens(full):
    text = "best of the worst times 1234"
    ids = full.encode(text)
    cut = trim_vocabulary(full, full.vocab_size - 20, Counter(ids))
    assert [cut.kept[id_] for id_ in cut.tokenizer.encode(text)] == ids
    assert len(trim_vocabulary(full, full.vocab_size - 20).tokenizer.encode(text)) > len(ids)
    assert cut.tokenizer.decode(cut.tokenizer.encode(TEXT)) == TEXT


def test_common_tokens_are_kept_first():
    counts = Counter(FULL.encode(TEXT))
    merged = [id_ for id_ in counts if len(FULL.token_bytes(id_)) > 1]
    cut = trim_vocabulary(FULL, 290, counts)
    dropped = [counts[id_] for id_ in merged if id_ not in cut.kept]
    assert len(cut.kept) == 290
    assert max(dropped) <= max(counts[id_] for id_ in merged if id_ in cut.kept)


@pytest.mark.parametrize(
    "size, message", [(319, "has only 318"), (100, "no room for merges"), (0, "no room")]
)
def test_impossible_sizes_are_refused(size, message):
    with pytest.raises(TokenizerError, match=message):
        trim_vocabulary(FULL, size)


def test_a_tokenizer_without_merges_is_refused():
    from tokenizers import models

    library = Library(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="only BPE"):
        trim_vocabulary(LibraryTokenizer(library), 2)
