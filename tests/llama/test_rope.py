"""Rotary positions compared with transformers, with Meta's formula in float64, and their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from herd.checkpoint.hf import config_to_hf
from herd.llama import rope
from herd.llama.config import SIZES, ModelConfig, RopeScaling
from herd.llama.model import LlamaLM


def shape(head_dim: int, theta: float = 500_000.0, scaling: RopeScaling | None = None) -> ModelConfig:
    return ModelConfig(
        10, 2 * head_dim, 1, 2, 1, 8, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling
    )


def meta_frequencies(config: ModelConfig) -> list[float]:
    """Meta's `apply_scaling`, line by line, in float64."""
    out = []
    for i in range(0, config.head_dim, 2):
        freq = 1.0 / config.rope_theta ** (i / config.head_dim)
        s = config.rope_scaling
        if s is not None:
            wavelength = 2 * math.pi / freq
            if wavelength > s.original_context / s.low_freq_factor:
                freq = freq / s.factor
            elif wavelength >= s.original_context / s.high_freq_factor:
                smooth = (s.original_context / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                freq = (1 - smooth) * freq / s.factor + smooth * freq
        out.append(freq)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_match_transformers_and_meta(size):
    config = SIZES[size]
    ours = rope.inverse_frequencies(config)
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config_to_hf(config)), "cpu")
    assert ours.dtype == torch.float32
    assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours.double(), torch.tensor(meta_frequencies(config)).double(), rtol=2e-6, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    theta=st.floats(100.0, 1e7),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 3.0),
    width=st.floats(0.1, 8.0),
    original=st.integers(16, 16_384),
)
def test_any_scaling_matches_transformers(head_dim, theta, factor, low, width, original):
    config = shape(head_dim, theta, RopeScaling(factor, low, low + width, original))
    ours = rope.inverse_frequencies(config)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config_to_hf(config)), "cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    # Near a threshold fp32 may fall on the other side than float64, where the formula itself jumps only if
    # factor > 1.
    assert torch.all(ours <= 1.0)
    assert torch.all(ours[1:] <= ours[:-1] * (1 + 1e-6)) or factor > 1


def test_factor_one_changes_nothing():
    plain, scaled = shape(64), shape(64, scaling=RopeScaling(factor=1.0, original_context=64))
    torch.testing.assert_close(
        rope.inverse_frequencies(scaled), rope.inverse_frequencies(plain), rtol=1e-6, atol=0
    )


def test_scores_depend_on_distance_only():
    config = shape(32, scaling=RopeScaling(original_context=64))
    inv_freq = rope.inverse_frequencies(config).double()
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64, generator=generator)

    def score(m: int, n: int) -> float:
        rotated = []
        for x, position in ((q, m), (k, n)):
            angles = torch.tensor([[position]])[..., None] * inv_freq
            angles = torch.cat((angles, angles), -1)[..., None, :]
            rotated.append(rope.rotate(x, angles.cos(), angles.sin()))
        return float((rotated[0] * rotated[1]).sum())

    for m, n in ((5, 3), (100, 90), (7, 7)):
        assert score(m, n) == pytest.approx(score(m + 4321, n + 4321), abs=1e-9)


@settings(deadline=None)
@given(position=st.integers(0, 131_071))
def test_rotation_keeps_length_and_zero_is_identity(position):
    config = SIZES["8B"]
    x = torch.randn(1, 2, 1, config.head_dim, generator=torch.Generator().manual_seed(position))
    cos, sin = rope.rotation(rope.inverse_frequencies(config), torch.tensor([[0, position]]), torch.float32)
    out = rope.rotate(x, cos, sin)
    torch.testing.assert_close(out[:, 0], x[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_half_rotation_layout_equals_meta_pairs():
    """Meta multiplies complex pairs (2i, 2i + 1). Permuting the channels gives the half-rotation form used
    here."""
    config = shape(16)
    x = torch.randn(1, 9, 2, 16, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9)[None]
    inv_freq = rope.inverse_frequencies(config)
    turns = torch.polar(torch.ones(9, 8), positions[0, :, None] * inv_freq)[None, :, None]
    meta = torch.view_as_real(torch.view_as_complex(x.view(1, 9, 2, 8, 2)) * turns)
    halves = x.view(1, 9, 2, 8, 2).transpose(-1, -2).reshape(1, 9, 2, 16)
    ours = rope.rotate(halves, *rope.rotation(inv_freq, positions, torch.float32))
    torch.testing.assert_close(ours, meta.transpose(-1, -2).reshape(1, 9, 2, 16), rtol=1e-5, atol=1e-5)


def test_casting_a_model_keeps_its_rotations_exact():
    config = shape(16, scaling=RopeScaling(original_context=64))
    exact = rope.inverse_frequencies(config)
    model = LlamaLM.on_meta(config)
    for changed in (LlamaLM(config).to(torch.bfloat16), LlamaLM(config).half(), model.to_empty(device="cpu")):
        assert changed.model.inv_freq.dtype == torch.float32
        assert torch.equal(changed.model.inv_freq, exact)
