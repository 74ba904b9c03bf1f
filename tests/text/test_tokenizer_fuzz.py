"""Damaged tokenizer files are read or refused in one line. What is read encodes any text without losing any of it."""

import json
import random
import warnings

import pytest

from herd.errors import HerdError
from herd.text import Tokenizer
from herd.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN

TEXTS = ["", "Hello, world! 12345", "  naïve\n\n\tfoo(bar) 日本語 🦙", "<|eot_id|></s>\x00"]
VALUES = [None, True, 0, -1, 2**40, 1.5, "", "x", "▁", "Ġ", "(", [], {}, ["a", "b"], {"type": "BPE"}]


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> list[dict]:
    """The tokenizer.json of a vocabulary of ranks, and one of SentencePiece's kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the quick brown fox " * 9], 520).save(folder)
    ranks = json.loads((folder / "tokenizer.json").read_text())
    ranks["added_tokens"] = ranks["added_tokens"][:20]
    letters, joined = "▁theof", ("▁t", "he", "▁the")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *joined]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"]]
    model |= {"vocab": {word: n for n, word in enumerate(words)}, "merges": merges}
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spm = {
        "version": "1.0",
        "added_tokens": [
            {"id": n, "content": words[n], "special": True, "normalized": False, "single_word": False}
            | {"lstrip": False, "rstrip": False}
            for n in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }
    return [ranks, spm]


def places(value, path=()):
    """Yield the paths of all values within ``value``."""
    yield path
    if isinstance(value, dict):
        for key, item in list(value.items())[:12]:
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:6]):
            yield from places(item, (*path, index))


def damaged(content: dict, rng: random.Random) -> dict:
    out = json.loads(json.dumps(content))
    for _ in range(rng.randrange(1, 4)):
        *parents, last = rng.choice([path for path in places(out) if path])
        inside = out
        for key in parents:
            inside = inside[key]
        if rng.random() < 0.3 and isinstance(inside, dict):
            del inside[last]
        else:
            inside[last] = rng.choice(VALUES)
    return out


def fuzz(contents, path, n: int, seed: int) -> None:
    rng = random.Random(seed)
    refused = []
    for _ in range(n):
        path.write_text(json.dumps(damaged(rng.choice(contents), rng)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tokenizer = Tokenizer.from_file(path)
                for text in TEXTS:
                    tokenizer.decode(tokenizer.encode(text, bos=True))
                    tokenizer.encode_with_special(text)
        except HerdError as error:
            refused.append(str(error))
    assert [reason for reason in refused if "\n" in reason] == []
    assert refused


def test_damaged_tokenizer_files_are_read_or_refused(contents, tmp_path):
    fuzz(contents, tmp_path / "tokenizer.json", 200, seed=0)


@pytest.mark.soak
def test_many_damaged_tokenizer_files_are_read_or_refused(contents, tmp_path):
    fuzz(contents, tmp_path / "tokenizer.json", 2000, seed=1)


@pytest.mark.parametrize("n", range(20))
def test_damaged_sentencepiece_files_are_read_or_refused(tmp_path, n):
    rng = random.Random(n)
    pieces = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<0x41>": BYTE, "▁": NORMAL, "a": NORMAL}
    encoded = [(word.encode(), kind) for word, kind in pieces.items()]
    inner = [
        b"\x0a" + bytes([len(w)]) + w + b"\x15\x00\x00\x00\x00\x18" + bytes([kind]) for w, kind in encoded
    ]
    data = bytearray(b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in inner) + b"\x12\x02\x18\x02")
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").vocab_size == len(pieces)
    for _ in range(20):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(broken[: rng.randrange(1, len(broken) + 1)])
        try:
            Tokenizer.from_file(tmp_path / "tokenizer.model").encode("a b")
        except HerdError as error:
            assert "\n" not in str(error)  # noqa: PT017
