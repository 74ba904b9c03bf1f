"""A small model whose dimensions are multiples of 256."""

import pytest

from herd.llama.config import ModelConfig, RopeScaling
from herd.llama.model import LlamaLM

CONFIG = ModelConfig(300, 256, 2, 4, 2, 512, rope_scaling=RopeScaling(original_context=64), max_context=256)


@pytest.fixture(scope="session")
def make_model():
    """make_model(seed, **changes of the configuration) -> LlamaLM."""

    def make(seed: int = 0, **changes) -> LlamaLM:
        return LlamaLM(CONFIG.replace(**changes)).init_weights(seed, std=0.1).eval()

    return make
