"""`config.json` is read as transformers reads it, in both dialects; other models are refused by key."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from herd.checkpoint.hf import config_from_hf, config_to_hf, read_config
from herd.errors import CheckpointError
from herd.llama.config import SIZES, ModelConfig, RopeScaling

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

scalings = st.builds(
    lambda factor, low, width, original: RopeScaling(factor, low, low + width, original),
    st.floats(1, 64),
    st.floats(0.25, 4),
    st.floats(0.25, 8),
    st.integers(1, 16384),
)
configs = st.builds(
    lambda kv, group, per_head, half, **rest: ModelConfig(
        n_kv_heads=kv, n_heads=kv * group, dim=kv * group * per_head, head_dim=2 * half, **rest
    ),
    kv=st.integers(1, 9),
    group=st.integers(1, 5),
    per_head=st.integers(1, 9),
    half=st.integers(1, 40),
    vocab_size=st.integers(1, 200_000),
    n_layers=st.integers(1, 130),
    ffn_dim=st.integers(1, 60_000),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    rope_theta=st.floats(2, 1e7),
    rope_scaling=st.none() | scalings,
    tie_embeddings=st.booleans(),
    max_context=st.integers(1, 200_000),
)


@pytest.mark.parametrize("data", [RELEASED_8B, NEW_8B])
def test_metas_released_config_gives_the_published_size(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_hf(data) == SIZES["8B"]


@settings(max_examples=40, deadline=None)
@given(config=configs)
def test_a_configuration_survives_both_dialects_and_transformers_reads_the_same(config):
    data = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(data) == config
    theirs = LlamaConfig(**copy.deepcopy(data))  # it changes what it is given
    assert config_from_hf(theirs.to_dict()) == config
    assert theirs.head_dim == config.head_dim
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")


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
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "default"}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": RELEASED_8B["rope_scaling"] | {"factor": "8"}}, "factor='8'"),
        ({"rope_scaling": RELEASED_8B["rope_scaling"] | {"factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3'"),
        ({"rope_theta": 1.0}, "rope_theta=1.0"),
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
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
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


def test_unknown_key_is_announced():
    with pytest.warns(UserWarning, match="frobnicate"):
        config_from_hf(RELEASED_8B | {"frobnicate": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted({**RELEASED_8B, **NEW_8B})), value=json_values)
def test_any_value_is_read_or_refused_in_one_line(key, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = config_from_hf(RELEASED_8B | {key: value})
        except CheckpointError:
            return
    assert isinstance(config, ModelConfig)


@settings(max_examples=100, deadline=None)
@given(part=st.sampled_from(sorted(NEW_8B["rope_parameters"])), value=json_values)
def test_any_rope_value_is_read_or_refused(part, value):
    data = NEW_8B | {"rope_parameters": NEW_8B["rope_parameters"] | {part: value}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = config_from_hf(data)
        except CheckpointError:
            return
    assert isinstance(config, ModelConfig)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "\x00\xff"])
def test_a_malformed_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "config.json")
