"""Encoders compared with llama.cpp's own on weights of a real model, with and without importance."""

import ggml
import pytest
import torch

from herd.checkpoint.gguf_folder import GGUFSource
from herd.quant import FORMATS, blocks

PACKED = list(FORMATS.values())


@pytest.fixture(scope="module")
def real_weights(real_data):
    """Return rows of two matrices of SmolLM2, by whether they are wide enough for blocks of 256."""
    source = GGUFSource(real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    down = source.weight("model.layers.7.mlp.down_proj.weight", torch.float32)[:96]
    query = source.weight("model.layers.3.self_attn.q_proj.weight", torch.float32)[:96]
    # The file has 4 bits. Noise below its steps fills the gaps between them, as the original weights do
    generator = torch.Generator().manual_seed(0)
    return [w + 0.02 * w.std() * torch.randn(w.shape, generator=generator) for w in (down, query)]


def importance_of(width: int) -> torch.Tensor:
    """Return mean squares of inputs as those of a language model: a few columns are far above the others."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(width, generator=generator).mul(1.5).exp()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("format", PACKED, ids=str)
def test_errors_are_at_most_those_of_llama_cpp(real_weights, format, weighted):
    ggml.require_ggml()
    for x_RD in real_weights:
        if x_RD.shape[1] % format.block:
            continue
        importance_D = importance_of(x_RD.shape[1]) if weighted else None
        column_D = torch.ones(x_RD.shape[1]) if importance_D is None else importance_D
        ours, theirs = (
            float(((blocks.decode(rows_RB, format) - x_RD).square() * column_D).sum())
            for rows_RB in (
                blocks.encode(x_RD, format, importance_D=importance_D),
                ggml.encode(x_RD, format, importance_D),
            )
        )
        assert ours <= 1.02 * theirs, (ours / theirs, x_RD.shape)


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_llama_cpp_reads_the_same_weights(real_weights, format):
    ggml.require_ggml()
    rows_RB = blocks.encode(real_weights[0], format)
    assert torch.equal(ggml.decode(rows_RB, format), blocks.decode(rows_RB, format))
