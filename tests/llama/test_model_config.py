"""Sizes, counts and costs compared with published numbers, the model itself, and torch's FLOP counter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from herd.errors import ConfigError
from herd.llama.config import SIZES, ModelConfig, RopeScaling
from herd.llama.model import LlamaLM

PUBLISHED = {
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
}
SMALL = {"vocab_size": 97, "dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3, "ffn_dim": 80}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_on_the_meta_device(size):
    model = LlamaLM.on_meta(SIZES[size])
    assert sum(param.numel() for param in model.parameters()) == SIZES[size].n_params == PUBLISHED[size]


def test_bytes_of_weights_and_cache():
    assert SIZES["8B"].nbytes() == 16_060_522_496
    assert SIZES["405B"].nbytes() == 811_706_777_600
    assert SIZES["405B"].nbytes(0.5) == 202_926_694_400
    kv = {size: SIZES[size].kv_nbytes_per_token() for size in ("8B", "70B", "405B")}
    assert kv == {"8B": 131_072, "70B": 327_680, "405B": 516_096}


def test_flops_by_hand():
    # 8B: per layer 4096*(4096+1024+1024+4096) + 3*4096*14336; head 4096*128256; 2 FLOPs per multiply-add.
    assert SIZES["8B"].flops_per_token() == 2 * (32 * (41_943_040 + 176_160_768) + 525_336_576)
    assert SIZES["8B"].flops_per_token(8192) - SIZES["8B"].flops_per_token() == 4 * 32 * 4096 * 8192
    assert SIZES["8B"].flops_per_token(4096, training=True) == 3 * SIZES["8B"].flops_per_token(4096)
    # 6 N D: the paper's 3.8e25 for 405B on 15.6T tokens counts matmul parameters (all but the embedding)
    # only.
    assert SIZES["405B"].flops_per_token(training=True) * 15.6e12 == pytest.approx(3.8e25, rel=0.01)


@pytest.mark.parametrize("extra", [{}, {"head_dim": 24}, {"tie_embeddings": True}, {"n_kv_heads": 6}])
def test_flops_equal_torch_counter(extra):
    config = ModelConfig(**(SMALL | extra))
    model = LlamaLM(config)
    B, T = 2, 24
    # The plain kernel, whose matmuls the counter sees. It multiplies all T keys, causal or not.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.logits(torch.zeros(B, T, dtype=torch.long))
    assert counter.get_total_flops() == B * T * config.flops_per_token(T)


@pytest.mark.parametrize("tie", [False, True])
def test_shapes_are_the_models(tie):
    config = ModelConfig(**SMALL, tie_embeddings=tie, head_dim=10)
    shapes = {name: tuple(param.shape) for name, param in LlamaLM(config).named_parameters()}
    assert shapes == dict(config.param_shapes())


dims = st.integers(-2, 40)


@settings(max_examples=300, deadline=None)
@given(st.lists(dims, min_size=7, max_size=7), st.floats())
def test_a_config_is_valid_or_refused(numbers, theta):
    vocab_size, heads, kv, per_head, layers, ffn, head_dim = numbers
    dim = heads * per_head if heads % 3 else per_head
    try:
        config = ModelConfig(vocab_size, dim, layers, heads, kv, ffn, head_dim=head_dim, rope_theta=theta)
    except ConfigError:
        return
    assert config.n_heads % config.n_kv_heads == 0
    assert config.head_dim % 2 == 0
    assert sum(param.numel() for param in LlamaLM.on_meta(config).parameters()) == config.n_params


@pytest.mark.parametrize(
    "change, named",
    [
        ({"n_kv_heads": 4}, "n_kv_heads=4"),
        ({"dim": 50}, "dim=50"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"head_dim": -2}, "head_dim=-2"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"n_layers": 2.0}, "n_layers=2.0"),
        ({"n_layers": True}, "n_layers=True"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rope_theta": 1.0}, "rope_theta=1.0"),
    ],
)
def test_errors_name_the_field_and_its_value(change, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig(**(SMALL | change))


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 0.5},
        {"factor": float("nan")},
        {"factor": float("inf")},
        {"low_freq_factor": 4.0},
        {"low_freq_factor": 0.0},
        {"high_freq_factor": float("inf")},
        {"original_context": 0},
    ],
)
def test_impossible_rope_scaling_is_refused(change):
    with pytest.raises(ConfigError):
        RopeScaling(**change)


def test_replace_derives_head_dim_again():
    config = ModelConfig(**SMALL)
    assert config.replace(n_heads=3, head_dim=0).head_dim == 16
    assert config.replace(n_layers=5).head_dim == 8
