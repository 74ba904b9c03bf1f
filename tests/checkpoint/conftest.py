"""A small model with large random weights, and a small trained tokenizer."""

import pytest
import torch

from herd import checkpoint
from herd.llama.config import ModelConfig, RopeScaling
from herd.llama.model import LlamaLM
from herd.text.tokenizer import Tokenizer

CONFIG = ModelConfig(600, 48, 2, 6, 3, 80, rope_scaling=RopeScaling(original_context=64), max_context=512)


@pytest.fixture(scope="session")
def make_model():
    """Return make_model(dtype=..., **changes of the configuration) -> LlamaLM. Its norms differ from 1."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaLM:
        model = LlamaLM(CONFIG.replace(**changes)).init_weights(seed, std=0.25)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                if param.ndim == 1:
                    param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    text = [
        "The quick brown fox jumps over the lazy dog, again and again. " * 3,
        "def area(r): return 3 * r * r\n" * 3,
    ]
    return Tokenizer.train(text, 256 + 256 + 20)


@pytest.fixture(scope="module")
def plain(request, tmp_path_factory, make_model, tokenizer):
    """A folder of a model of the test's module's `SHAPE`, with plain weights."""
    folder = tmp_path_factory.mktemp("plain") / "toy"
    lineage = checkpoint.Lineage(name="toy", stage="teacher")
    checkpoint.save_model(folder, make_model(**request.module.SHAPE), tokenizer, lineage=lineage)
    return folder


@pytest.fixture(scope="session")
def same_bits():
    """Return a function that asserts that two models have the same parameters, bit for bit."""

    def check(a: LlamaLM, b: LlamaLM) -> None:
        ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, param in ours.items():
            assert param.dtype == theirs[name].dtype, name
            assert torch.equal(param.view(torch.uint8), theirs[name].view(torch.uint8)), name

    return check
