"""Small models with fixed random weights, and a tokenizer of plain bytes."""

import pytest
import torch

from herd.llama import ModelConfig, RopeScaling
from herd.llama.model import LlamaLM


class ByteTokenizer:
    """A tokenizer with one token per byte and three special tokens: as much as the engine needs."""

    vocab_size = 259
    bos_id, eos_id = 256, 257
    stop_ids = frozenset({257})
    adds_space = False
    special_tokens = {"<bos>": 256, "<eos>": 257, "<pad>": 258}  # noqa: RUF012

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [256] * bos + list(text.encode()) + [257] * eos

    def decode(self, ids, *, skip_special: bool = False, errors: str = "replace") -> str:
        return self.decode_bytes(ids).decode(errors=errors)

    def decode_bytes(self, ids, *, skip_special: bool = False) -> bytes:
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, i: int) -> bytes:
        return bytes([i]) if i < 256 else (b"<bos>", b"<eos>", b"<pad>")[i - 256]


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()


def build(seed: int = 0, std: float = 0.2, **changes) -> LlamaLM:
    """Return a model whose weights are wide enough that the likeliest token differs from place to place."""
    config = ModelConfig(259, 48, 3, 6, 2, 80, rope_theta=10_000.0, max_context=512)
    return LlamaLM(config.replace(**changes)).init_weights(seed, std=std)


@pytest.fixture(scope="session")
def make_model():
    return build


@pytest.fixture(scope="session")
def model() -> LlamaLM:
    return build()


@pytest.fixture(scope="session")
def models() -> dict[str, LlamaLM]:
    """Models of different shapes: grouped, ungrouped or one KV head, tied, scaled positions."""
    scaled = RopeScaling(factor=4.0, original_context=64)
    return {
        "grouped": build(),
        "ungrouped": build(1, n_heads=3, n_kv_heads=3, head_dim=0),
        "single": build(2, n_kv_heads=1, tie_embeddings=True, std=0.1),
        "scaled": build(3, rope_scaling=scaled, head_dim=16),
    }


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
