"""A byte-level tokenizer and small corpora for the tests of this room."""

import pytest

from herd.data.shards import Shards
from herd.data.sources import Document


class Bytes:
    """A tokenizer whose ids are bytes: decoding is trivial, so tests can check texts by eye."""

    n_ordinary, vocab_size, bos_id, eos_id, start_ids = 256, 512, 256, 257, (256,)
    sha256 = "b" * 64

    def encode(self, text, bos=False, eos=False):
        return [self.bos_id] * bos + list(text.encode()) + [self.eos_id] * eos

    def token_bytes(self, id):
        return bytes([id])

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.fixture(scope="session")
def byte_tokenizer():
    return Bytes()


@pytest.fixture(scope="session")
def documents():
    texts = [f"Document {n}.\n" + f"Line of number {n}.\n" * (n % 7) for n in range(60)]
    return [Document(text, f"file{n}.txt", "text", ("de", "en")[n % 2]) for n, text in enumerate(texts)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory, documents, byte_tokenizer):
    return Shards.write(tmp_path_factory.mktemp("shards") / "s", documents, byte_tokenizer, file_tokens=501)
