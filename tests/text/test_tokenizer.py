"""The tokenizer against tiktoken and published vectors. Round trips, special spellings and long inputs by property."""

import base64
import hashlib
import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import TokenizerError
from herd.text import StreamDecoder, Tokenizer
from herd.text import ranks_tokenizer as tokenizer_module
from herd.text.ranks import last_merge, merges, ranks_bytes, spell, unspell
from herd.text.ranks_tokenizer import SPECIAL_TOKENS, split_long
from herd.text.tokenizer_json import PATTERN, TRAINING_PATTERN

any_text = st.text(st.characters(exclude_categories=["Cs"]))


# Published numbers: llama-models models/llama3/tests/api/test_tokenizer.py and tokenizer.py at the 3.1 release


def test_published_ids_are_reproduced(meta):
    assert meta.encode("This is a test sentence.", bos=True, eos=True) == [
        128000, 2028, 374, 264, 1296, 11914, 13, 128001,
    ]  # fmt: skip
    assert meta.encode("This is a response.") == [2028, 374, 264, 2077, 13]
    words = {"system": [9125], "user": [882], "assistant": [78191], "\n\n": [271]}
    assert {word: meta.encode(word) for word in words} == words
    assert meta.decode([128000, 2028, 374, 264, 1296, 11914, 13, 128001]) == (
        "<|begin_of_text|>This is a test sentence.<|end_of_text|>"
    )


def test_special_tokens_have_the_ids_of_the_release(meta):
    assert (meta.vocab_size, meta.n_ranks, len(SPECIAL_TOKENS)) == (128256, 128000, 256)
    assert (meta.bos_id, meta.eos_id, meta.pad_id) == (128000, 128001, 128004)
    assert (meta.start_header_id, meta.end_header_id) == (128006, 128007)
    assert (meta.eom_id, meta.eot_id, meta.python_tag_id) == (128008, 128009, 128010)
    assert meta.stop_ids == {128001, 128008, 128009}
    expected = {
        "<|reserved_special_token_0|>": 128002,
        "<|reserved_special_token_1|>": 128003,
        "<|step_id|>": 128005,
        "<|reserved_special_token_2|>": 128011,
        "<|reserved_special_token_246|>": 128255,
    }
    assert {name: meta.special_tokens[name] for name in expected} == expected


def test_the_hash_is_that_of_the_canonical_file(meta, real_data, small):
    file = real_data("llama3_tokenizer") / "tokenizer.model"
    assert meta.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert meta.sha256.startswith("82e9d31979e9")
    assert small.sha256 == hashlib.sha256(ranks_bytes(small.ranks)).hexdigest() != meta.sha256


# tiktoken built independently from the same file


def test_ids_equal_tiktokens_in_ten_languages(meta, real_data):
    lines = (real_data("llama3_tokenizer") / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    oracle = tiktoken.Encoding("oracle", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    files = [*real_data("common_voice_sentences").rglob("*.txt"), *real_data("ud_pud_parallel").glob("*.txt")]
    languages = set()
    for file in files:
        text = file.read_text(encoding="utf-8")[:20_000]
        ids = meta.encode(text)
        assert ids == oracle.encode_ordinary(text)
        assert meta.decode(ids) == text
        languages.add(file.stem if file.parent.name == "ud_pud_parallel" else file.parent.name)
    assert {"en", "de", "fr", "it", "pt", "hi", "es", "th", "ja", "zh"} <= languages


# Properties


@given(text=any_text)
def test_any_text_comes_back(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(id_ < small.n_ranks for id_ in ids)
    assert small.encode(text, bos=True, eos=True) == [small.bos_id, *ids, small.eos_id]
    assert small.encode_batch([text, "x", text]) == [ids, small.encode("x"), ids]


@given(parts=st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), any_text), max_size=6))
def test_spelled_special_tokens_are_text(small, parts):
    text = "".join(parts)
    ids = small.encode(text)
    assert not set(ids) & set(small.special_tokens.values())
    assert small.decode(ids, skip_special=True) == text


@given(data=st.data())
def test_streamed_text_equals_decoded_text(small, data):
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(small)
    pieces, rest = [], list(ids)
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        pieces.append(decoder.feed(rest[:n] if n > 1 else rest[0]))
        rest = rest[n:]
    assert "".join(pieces) + decoder.finish() == small.decode(ids)


def test_stream_decoder_holds_unfinished_characters(small):
    decoder = StreamDecoder(small)
    pieces = [decoder.feed(small.ranks[bytes([byte])]) for byte in "é🦙".encode()]
    assert pieces == ["", "é", "", "", "", "🦙"]
    assert decoder.feed(small.ranks[b"\xf0"]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.feed(small.encode("x")) + decoder.finish() == "x"


def test_decoding_of_broken_utf8_and_unknown_ids(small):
    half = [small.ranks[b"\xc3"]]
    assert small.decode(half) == "\ufffd"
    assert small.decode_bytes(half) == b"\xc3"
    with pytest.raises(TokenizerError, match="not UTF-8"):
        small.decode(half, errors="strict")
    assert small.token_bytes(small.eot_id) == b"<|eot_id|>"
    assert small.decode([*small.encode("a"), small.eot_id], skip_special=True) == "a"
    for id_ in (-1, small.vocab_size):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            small.decode([id_])


def test_text_without_utf8_form_is_refused(small):
    with pytest.raises(TokenizerError, match=r"U\+D800 at character 1"):
        small.encode("é\ud800")
    with pytest.raises(TokenizerError, match="must be str, not bytes"):
        small.encode(b"x")  # type: ignore[arg-type]


# Long inputs: the cuts are those of Meta's character-by-character loop


def _cuts_by_the_character(text: str, max_chars: int, max_run: int) -> list[str]:
    pieces = []
    for start in range(0, len(text), max_chars):
        piece, run = "", 0
        for before, character in zip(" " + text[start:], text[start : start + max_chars], strict=False):
            run = run + 1 if piece and before.isspace() == character.isspace() else 1
            if run > max_run:
                pieces.append(piece)
                piece, run = "", 1
            piece += character
        pieces.append(piece)
    return pieces


@given(text=st.text(st.sampled_from("ab \n\u2003\x85\x1c"), min_size=1, max_size=120))
def test_long_inputs_are_cut_as_meta_cuts_them(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_CHARS", 25)
        patch.setattr(tokenizer_module, "MAX_RUN", 4)
        if len(text) > 4:
            assert list(split_long(text)) == _cuts_by_the_character(text, 25, 4)


@pytest.mark.parametrize("text", ["a" * 60_000, " " * 60_000, "a b" * 150_000, "\n" * 30_000 + "é" * 30_000])
def test_long_inputs_round_trip(small, text):
    assert small.decode(small.encode(text)) == text
    assert small.encode_batch([text]) == [small.encode(text)]


# Training


def test_training_equals_the_trained_model(sample):
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    lines = [line + "\n" for line in sample.split("\n")] * 3
    trained = HFTokenizer(models.BPE())

    def pieces(pattern):
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])

    trained.pre_tokenizer = pieces(TRAINING_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=644, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(lines, trainer)
    ours = Tokenizer.train(lines, 900)
    assert {unspell(word): id_ for word, id_ in trained.get_vocab().items()} == ours.ranks
    assert [ours.ranks[bytes([byte])] < 256 for byte in range(256)] == [True] * 256
    trained.pre_tokenizer = pieces(PATTERN)
    for text in [*lines, sample, sample[::-1], sample.upper()]:
        assert ours.encode(text) == trained.encode(text).ids


def test_numbers_are_digits_and_words_are_the_same_behind_a_sign():
    ours = Tokenizer.train(['12345 "banana" (banana) banana: 12345\n', "12345banana.banana\n"] * 50, 518)
    assert all(sum(chr(byte).isdigit() for byte in token) < 2 for token in ours.ranks)
    word = ours.encode("banana")
    for text in ('"banana"', "(banana)", "\tbanana", "_banana"):
        assert ours.encode(text)[1 : 1 + len(word)] == word
    assert len(ours.encode("2024-03-15")) == 10


def test_training_is_deterministic_and_exact_in_size(small, sample):
    again = Tokenizer.train([line + "\n" for line in sample.split("\n")] * 3, 900)
    assert again == small
    assert again.vocab_size == 900 == again.n_ranks + 256
    assert len(small.encode(sample)) < len(sample.encode()) / 2


@pytest.mark.parametrize(
    "texts, vocab_size, message",
    [
        (["abc"], 511, "at least 256 bytes"),
        (["abc"], 1000, "more than these texts can fill: use 514 or more text"),
        ([], 600, "more than these texts can fill: use 512 or more text"),
        (["a\ud800"], 600, "lone surrogate"),
    ],
)
def test_impossible_vocabulary_sizes_are_refused(texts, vocab_size, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.train(texts, vocab_size)


# Ranks files


def _lines(ranks: dict[bytes, int]) -> list[bytes]:
    return ranks_bytes(ranks).splitlines()


BYTES = _lines({bytes([byte]): byte for byte in range(256)})


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "empty"),
        ([b"<unk> 0"], "is not 'base64 rank'"),
        ([*BYTES, b"YWI="], ":257: b'YWI=' is not 'base64 rank'"),
        ([*BYTES, b"YWI= x"], ":257"),
        ([*BYTES, b"Y\xff= 256"], ":257"),
        ([*BYTES, b"YWI= 256", b"YWI= 257"], r":258: token b'ab' has two ranks, 256 and 257"),
        ([*BYTES, b"YWI= 256", b"YWJj 256"], "rank 256 is there twice"),
        ([*BYTES, b"YWI= 257"], "rank 256 is missing"),
        ([*BYTES, b"YWI= -1"], "rank -1 is there twice"),
        ([*BYTES[:65], b"YWI= 65", *BYTES[66:]], r"1 of the 256 single bytes are not tokens \(first: 0x41\)"),
        ([b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00"], "SentencePiece"),
    ],
)
def test_malformed_ranks_files_are_refused(tmp_path, lines, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_one_error_line(tmp_path):
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="has neither"):
        Tokenizer.from_folder(tmp_path)


# Merges from ranks: the argument in ranks.py, tried on vocabularies no trainer would make


@st.composite
def _random_ranks(draw) -> dict[bytes, int]:
    words = draw(
        st.lists(st.binary(min_size=2, max_size=6).map(lambda b: bytes(97 + x % 3 for x in b)), unique=True)
    )
    return {bytes([byte]): byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}


@settings(max_examples=200)
@given(ranks=_random_ranks(), text=st.text("abc", max_size=30))
def test_one_merge_per_token_is_enough(ranks, text):
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers

    model = models.BPE(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=[(spell(left), spell(right)) for left, right in merges(ranks)],
        ignore_merges=True,
    )
    derived = HFTokenizer(model)
    derived.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle = tiktoken.Encoding("oracle", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    assert derived.encode(text).ids == oracle.encode_ordinary(text)


def test_an_unreachable_token_has_no_last_merge():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"bc": 256, b"abcd": 257, b"ab": 258, b"abc": 259}
    assert last_merge(b"abc", ranks) == (b"a", b"bc")
    assert last_merge(b"abcd", ranks) == (b"abc", b"d")
    del ranks[b"abc"]
    assert last_merge(b"abcd", ranks) is None


def test_every_byte_has_its_own_spelling():
    every = bytes(range(256))
    assert unspell(spell(every)) == every
    assert spell(b" \n\xc3A!") == "ĠĊÃA!"
    assert json.loads(json.dumps(spell(every))) == spell(every)
