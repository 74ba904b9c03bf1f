"""Two small models with random weights and one vocabulary, and a tokenizer learnt on a few sentences."""

import pytest
import torch

from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Ein schneller brauner Fuchs springt über den faulen Hund.",
    "def area(width, height):\n    return width * height\n",
    "Le renard brun saute par-dessus le chien paresseux; il neige à Noël.",
    "数式は 1234 + 5678 = 6912 です。",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(SENTENCES, 560)


def build(seed: int, vocab_size: int = 560, std: float = 0.15, **changes) -> LlamaLM:
    config = ModelConfig(vocab_size, 32, 2, 4, 2, 64, rope_theta=10_000.0, max_context=64)
    return LlamaLM(config.replace(**changes)).init_weights(seed, std=std)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES


@pytest.fixture(scope="session")
def make_model():
    return build


@pytest.fixture(scope="session")
def teacher() -> LlamaLM:
    return build(1)


@pytest.fixture(scope="session")
def student() -> LlamaLM:
    return build(2, dim=24, n_heads=3, n_kv_heads=1, head_dim=0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
