"""Vocabularies of other models against llama.cpp's vectors, transformers' tokenizers and SentencePiece itself."""

import io
import warnings

import pytest

from herd.checkpoint.gguf import GGUF, Strings
from herd.errors import TokenizerError
from herd.text.library_tokenizer import LibraryTokenizer
from herd.text.vocabulary import UNKNOWN, Vocabulary, read_sentencepiece

VECTORS = ("llama-bpe", "gpt-2", "qwen2", "deepseek-llm", "llama-spm")
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\ttab ",
    "naïve café – 123 4567 89",
    "日本語のテキスト。ไทย हिन्दी 🦙👩‍👩‍👧",
    "def f(x):\n    return {'a': [1, 2.5e-3]}\r\n",
    "</s> <s>[INST] <unk> <0x0A>",
    "\x00\x07\x1b[0m",
]


def from_gguf(path) -> LibraryTokenizer:
    metadata, found = GGUF(path).metadata, {}
    for key in ("model", "tokens", "token_type", "merges", "pre", "scores"):
        value = metadata.get(f"tokenizer.ggml.{key}")
        found[key] = value.decode() if isinstance(value, Strings) else value
    if found.pop("model") == "gpt2":
        found["scores"] = None
    vocabulary = Vocabulary(found.pop("tokens"), found.pop("token_type"), **found)
    return LibraryTokenizer(vocabulary.build(), unk=next(iter(vocabulary.of_type(UNKNOWN)), None))


@pytest.mark.parametrize("name", VECTORS)
def test_ids_are_llama_cpps(real_data, name):
    path = real_data("llamacpp_vectors") / f"ggml-vocab-{name}.gguf"
    tokenizer = from_gguf(path)
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer.encode(text)
        assert ids == [int(id_) for id_ in line.split()], repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A SentencePiece BPE model trained on a few sentences, with byte fallback as Llama 2's has."""
    spm = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentences = [
        f"{text} number {n} and more words to join together" for n in range(200) for text in TEXTS if text
    ]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return written.getvalue()


def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(sentencepiece_model):
    spm = pytest.importorskip("sentencepiece")
    oracle = spm.SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = LibraryTokenizer(read_sentencepiece(sentencepiece_model).build(), bos="<s>", unk="<unk>")
    for text in TEXTS:
        if "<" in text:  # the oracle has no way to treat "<s>" in a text as text
            continue
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text), repr(text)
        assert tokenizer.decode(ids) == text


def test_a_special_token_spelled_in_a_text_stays_text(sentencepiece_model):
    tokenizer = LibraryTokenizer(read_sentencepiece(sentencepiece_model).build(), bos="<s>", unk="<unk>")
    for text in ("</s>", "a <s> b", "<unk>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


def test_inexpressible_bytes_become_the_unknown_token_and_are_reported(real_data):
    tokenizer = from_gguf(real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert len(tokenizer.missing_bytes) == 21
    tokenizer.unk_id = tokenizer.special_tokens["<|endoftext|>"]
    with pytest.warns(UserWarning, match=r"cannot express U\+0004"):
        ids = tokenizer.encode("a\x04b")
    assert [tokenizer.token_bytes(id_) for id_ in ids] == [b"a", b"<|endoftext|>", b"b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.decode(tokenizer.encode("a\x05b")) == "a\x05b"
    tokenizer.unk_id = None
    with pytest.raises(TokenizerError, match=r"cannot express U\+0004"):
        tokenizer.encode("a\x04b")


@pytest.mark.parametrize(
    "vocabulary, said",
    [
        (Vocabulary(["a", "b"], [1, 1], merges=["a b"]), "the merge 'a b' needs a token"),
        (Vocabulary(["a"], [1], merges=[], pre="no-such"), "'no-such', which is not known; name one"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(vocabulary, said):
    vocabulary.pre = vocabulary.pre or "gpt-2"
    with pytest.raises(TokenizerError, match=said):
        vocabulary.build()


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 40, b"\x0a\x05abc", b"\x0a\x02\x08\x01", b"\x1a\x02\x18\x01"]
)
def test_what_is_no_sentencepiece_model_is_refused(data):
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        read_sentencepiece(data)
