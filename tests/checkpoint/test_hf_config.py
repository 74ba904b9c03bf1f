"""`config.json` is read as transformers reads it, in both dialects. Other models are refused by key."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from herd.checkpoint.hf import config_from_hf, config_to_hf, read_config
from herd.errors import CheckpointError
from herd.llama.config import SIZES, ModelConfig, RopeScaling
from herd.llama.rope import inverse_frequencies

# Meta's own file for Llama 3.1 8B Instruct, as released.
RELEASED_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
NEW_8B = {key: value for key, value in RELEASED_8B.items() if key not in ("rope_scaling", "rope_theta")} | {
    "rope_parameters": RELEASED_8B["rope_scaling"] | {"rope_theta": 500000.0}
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64}
KINDS = {"llama3": "llama3", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "factors": "longrope"}


def scaling_of(
    kind: str | None, half: int, context: int, values: tuple[float, int, float, float, int]
) -> RopeScaling | None:
    factor, original, low, width, seed = values
    match kind:
        case "llama3":
            return RopeScaling(factor, low, low + width, original)
        case "linear":
            return RopeScaling(factor, kind="linear")
        case "dynamic":
            return RopeScaling(factor, original_context=context, kind="dynamic")
        case "yarn":
            options = {"beta_fast": low + width, "beta_slow": low, "truncate": seed % 3 > 0}
            options |= {"attention_factor": width} if seed % 2 else {}
            return RopeScaling(factor, original_context=original + 1, kind="yarn", **options)
        case "factors":
            factors = tuple(float((seed * pair) % 7 + 0.5) for pair in range(1, half + 1))
            options = {"freq_factors": factors, "attention_factor": width}
            return RopeScaling(factor, original_context=original + 1, kind="factors", **options)
    return None


scaling_values = st.tuples(
    st.floats(1, 64), st.integers(1, 16384), st.floats(0.25, 4), st.floats(0.25, 8), st.integers(0, 100)
)
configs = st.builds(
    lambda kv, group, per_head, half, max_context, kind, values, **rest: ModelConfig(
        n_kv_heads=kv,
        n_heads=kv * group,
        dim=kv * group * per_head,
        head_dim=2 * half,
        max_context=max_context,
        rope_scaling=scaling_of(kind, half, max_context, values),
        **rest,
    ),
    kind=st.none() | st.sampled_from(sorted(KINDS)),
    values=scaling_values,
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    kv=st.integers(1, 9),
    group=st.integers(1, 5),
    per_head=st.integers(1, 9),
    half=st.integers(1, 40),
    vocab_size=st.integers(1, 200_000),
    n_layers=st.integers(1, 130),
    ffn_dim=st.integers(1, 60_000),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    rope_theta=st.floats(2, 1e7),
    tie_embeddings=st.booleans(),
    max_context=st.integers(1, 200_000),
)


@pytest.mark.parametrize("data", [RELEASED_8B, NEW_8B])
def test_metas_released_config_gives_the_published_size(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_hf(data) == SIZES["8B"]


@settings(max_examples=100, deadline=None)
@given(config=configs)
def test_a_configuration_survives_both_dialects_and_transformers_reads_the_same(config):
    data = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(data) == config
    theirs = LlamaConfig(**copy.deepcopy(data))  # it changes what it is given
    assert config_from_hf(theirs.to_dict()) == config
    assert theirs.head_dim == config.head_dim
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    kind = KINDS[config.rope_scaling.kind] if config.rope_scaling else "default"
    assert theirs.rope_parameters["rope_type"] == kind
    assert (theirs.attention_bias, theirs.mlp_bias) == (config.attention_bias, config.mlp_bias)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
        {"rope_type": "yarn", "factor": 8.0},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        YARN | {"mscale": 2.0, "attention_factor": None},
        YARN | {"beta_fast": 64, "beta_slow": None, "attention_factor": 1.25, "truncate": False},
        LONG | {"original_max_position_embeddings": 4096},
        LONG | {"factor": 3.0},
        LONG | {"attention_factor": 1.5, "short_factor": [2.5] * 64, "long_factor": [2.5] * 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
def test_every_kind_of_scaling_is_read_as_transformers_reads_it(scaling, dialect):
    """Speeds and the factor of cos and sin equal those that transformers computes from the same file."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    data = RELEASED_8B | {"max_position_embeddings": 32_768}
    if dialect == "rope_parameters":
        del data["rope_scaling"], data["rope_theta"]
        scaling = scaling | {"rope_theta": 500_000.0}
    data[dialect] = scaling
    config = config_from_hf(data)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(data)))
    torch.testing.assert_close(inverse_frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


def test_a_sliding_window_limits_the_context_and_says_so():
    with pytest.warns(UserWarning, match="sliding window of 4096 tokens; the context is limited to that"):
        assert config_from_hf(RELEASED_8B | {"sliding_window": 4096}).max_context == 4096
    for harmless in ({"sliding_window": 131_072}, {"sliding_window": 4096, "use_sliding_window": False}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert config_from_hf(RELEASED_8B | harmless).max_context == 131_072


def test_a_mistral_config_is_a_llama_with_mistrals_defaults():
    from transformers import MistralConfig

    data = {"model_type": "mistral"} | {k: v for k, v in RELEASED_8B.items() if k != "model_type"}
    stated = config_from_hf(data | {"sliding_window": None})
    assert stated == config_from_hf(RELEASED_8B)
    bare = {k: v for k, v in data.items() if k != "num_key_value_heads"}
    with pytest.warns(UserWarning, match="sliding window of 4096"):
        config = config_from_hf(bare)
    theirs = MistralConfig(**copy.deepcopy(bare))
    assert (config.n_kv_heads, config.max_context) == (theirs.num_key_value_heads, theirs.sliding_window)


def test_a_config_written_by_transformers_is_read(tmp_path):
    LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(tmp_path / "config.json")
    assert (config.dim, config.n_kv_heads, config.head_dim, config.norm_eps) == (32, 4, 8, 1e-6)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"mlp_bias": "yes"}, "mlp_bias='yes'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": "wide"}, "sliding_window='wide'"),
        ({"sliding_window": 0}, "max_context=0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantized by compressed-tensors"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "quantized by ExLlamaV2 (EXL2)"),
        ({"quantization_config": "int4"}, "quantization_config='int4'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized by MLX"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing; rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "'mrope'"),
        ({"rope_scaling": LONG | {"long_factor": [2.0] * 64}}, "short_factor and long_factor differ"),
        ({"rope_scaling": LONG | {"short_factor": 1.0, "long_factor": 1.0}}, "not a list"),
        ({"rope_scaling": LONG | {"short_factor": [1.0], "long_factor": [1.0]}}, "1 freq_factors"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1}}, "=1 must be at least 2"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate=1"),
        ({"rope_scaling": YARN | {"beta_slow": 40.0}}, "beta_slow"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "default"}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": RELEASED_8B["rope_scaling"] | {"factor": "8"}}, "factor='8'"),
        ({"rope_scaling": RELEASED_8B["rope_scaling"] | {"factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3'"),
        ({"rope_theta": 1.0}, "rope_theta=1.0"),
        ({"rope_theta": 10**400}, "rope_theta is beyond the range"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor is beyond the range"),
        ({"rope_parameters": NEW_8B["rope_parameters"] | {"rope_theta": 1e4}}, "disagree"),
        ({"rope_parameters": NEW_8B["rope_parameters"] | {"factor": 32.0}}, "disagree"),
        ({"num_key_value_heads": 5}, "n_kv_heads=5"),
        ({"hidden_size": 4096.0}, "hidden_size=4096.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
    ],
)
def test_keys_of_another_model_are_refused_by_name(change, named):
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        config_from_hf(RELEASED_8B | change)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    ("model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads").split(),
)
def test_a_missing_key_is_named(key):
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        config_from_hf({k: v for k, v in RELEASED_8B.items() if k != key})


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "max_position_embeddings"])
def test_format_default_is_announced(key):
    data = {k: v for k, v in RELEASED_8B.items() if k != key}
    with pytest.warns(UserWarning, match=key):
        config = config_from_hf(data)
    theirs = LlamaConfig(**copy.deepcopy(data))  # it changes what it is given
    assert (config.norm_eps, config.max_context) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("scaling", "ignored"),
    [
        ({"type": "linear", "factor": 2.0, "alpha": 3}, "alpha"),
        ({"rope_type": "default", "factor": 8.0}, "factor"),
        (YARN | {"attn_factor": 1.0, "low_freq_factor": 1.0}, "attn_factor, low_freq_factor"),
    ],
)
def test_a_key_that_a_kind_of_scaling_does_not_use_is_announced(scaling, ignored):
    with pytest.warns(UserWarning, match=f"rope_scaling has {ignored}, which rope_type"):
        config_from_hf(RELEASED_8B | {"rope_scaling": scaling})


@pytest.mark.parametrize("scaling", [{}, {"type": None}, {"rope_type": None, "factor": None}])
def test_a_scaling_without_values_is_none(scaling):
    assert config_from_hf(RELEASED_8B | {"rope_scaling": scaling}).rope_scaling is None
    parameters = scaling | {"rope_theta": 500_000.0}
    config = config_from_hf(NEW_8B | {"rope_parameters": parameters})
    assert (config.rope_scaling, config.rope_theta) == (None, 500_000.0)


def test_unknown_key_is_announced():
    with pytest.warns(UserWarning, match="frobnicate"):
        config_from_hf(RELEASED_8B | {"frobnicate": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


LONG_KEYS = [*YARN, *LONG, *"mscale mscale_all_dim attention_factor beta_fast beta_slow truncate".split()]
changed_files = st.one_of(
    st.builds(
        lambda key, value: RELEASED_8B | {key: value},
        st.sampled_from(sorted({**RELEASED_8B, **NEW_8B})),
        json_values,
    ),
    st.builds(
        lambda part, value: NEW_8B | {"rope_parameters": NEW_8B["rope_parameters"] | {part: value}},
        st.sampled_from(sorted(NEW_8B["rope_parameters"])),
        json_values,
    ),
    st.builds(
        lambda start, key, value: RELEASED_8B | {"rope_scaling": start | {key: value}},
        st.sampled_from([YARN, LONG, YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}]),
        st.sampled_from(LONG_KEYS),
        json_values,
    ),
)


@settings(max_examples=700, deadline=None)
@given(data=changed_files)
def test_any_value_is_read_or_refused_in_one_line(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = config_from_hf(data)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
            return
    assert bool(torch.isfinite(inverse_frequencies(config)).all())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "\x00\xff"])
def test_a_malformed_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "config.json")
