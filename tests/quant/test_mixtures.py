"""llama.cpp's file types: every tensor has the format that llama.cpp's own quantizer gives it."""

import pytest

from herd.errors import QuantError
from herd.llama.config import SIZES, ModelConfig
from herd.quant import FORMATS, TYPES
from herd.quant.mixtures import FILE_TYPES, file_type, mixture, named_scheme, target_bits, with_parts

CONFIG = ModelConfig(300, 256, 8, 8, 2, 512, max_context=256)
DOWN, VALUES = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.self_attn.v_proj.weight"


def test_sizes_of_llama_3_1_8b_are_those_of_published_files():
    """Bits per weight of this model as in llama.cpp's README of its quantizer."""
    published = {
        "Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "IQ4_XS": 4.4597,
        "IQ4_NL": 4.6818, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944, "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633,
        "Q8_0": 8.5008, "F16": 16.0005,
    }  # fmt: skip
    config = SIZES["8B"]
    for name, bits in published.items():
        ours = 8 * mixture(name, config).nbytes(config) / config.n_params
        assert ours == pytest.approx(bits, abs=2e-3), name


def test_more_bits_go_to_values_and_down_projections():
    formats = mixture("Q4_K_M", CONFIG).formats
    counts = [formats[DOWN.format(layer)].name for layer in range(8)]
    assert counts.count("Q6_K") == 4
    assert counts[0] == counts[7] == "Q6_K"
    assert formats["model.layers.0.mlp.up_proj.weight"].name == "Q4_K"
    assert formats["model.embed_tokens.weight"].name == "Q4_K"
    assert formats["lm_head.weight"].name == "Q6_K"
    assert formats["model.norm.weight"].name == "F32"


def test_rows_that_do_not_divide_get_a_similar_format():
    config = ModelConfig(300, 96, 2, 4, 2, 200, max_context=256)
    with pytest.warns(
        UserWarning, match=r"16 matrices have rows of \[96, 200\] weights.* stored in F16, Q5_0, Q8_0"
    ):
        formats = named_scheme("Q4_K_M", config).plan(config)
    assert formats["model.layers.0.mlp.up_proj.weight"].name == "Q5_0"
    assert formats["lm_head.weight"].name == "Q8_0"
    assert formats[DOWN.format(0)].name == "F16"


def test_rules_that_depend_on_importance():
    plain, weighted = (mixture("Q4_0", CONFIG, with_importance=w).formats for w in (False, True))
    assert (plain[DOWN.format(0)].name, weighted[DOWN.format(0)].name) == ("Q4_0", "Q4_1")
    plain, weighted = (mixture("IQ4_XS", CONFIG, with_importance=w).formats for w in (False, True))
    assert (plain[DOWN.format(0)].name, weighted[DOWN.format(0)].name) == ("Q5_K", "IQ4_XS")
    assert weighted[VALUES.format(0)].name == "Q5_K"


@pytest.mark.parametrize("name", FILE_TYPES)
def test_the_number_of_a_file_is_that_of_its_mixture(name):
    assert file_type(CONFIG, mixture(name, CONFIG).formats) == FILE_TYPES[name]


def test_the_number_of_other_files_is_that_of_their_main_format():
    uniform = named_scheme("q4k", CONFIG).plan(CONFIG)
    assert file_type(CONFIG, uniform) == FILE_TYPES["Q4_K_S"]
    other = dict.fromkeys(uniform, TYPES["IQ2_XS"])
    assert file_type(CONFIG, other) == 1024


def test_names_that_a_user_types():
    assert named_scheme("q4_k_m", CONFIG) == named_scheme("Q4_K", CONFIG) == mixture("Q4_K_M", CONFIG)
    assert {f.name for f in named_scheme("q4k", CONFIG).plan(CONFIG).values()} == {"Q4_K", "Q8_0", "F32"}
    with pytest.raises(QuantError, match=r"'q3' is not known: choose .*Q4_K_M.*q4k"):
        named_scheme("q3", CONFIG)
    assert (target_bits("4.2bpw"), target_bits("4 BPW"), target_bits("Q4_0")) == (4.2, 4.0, None)
    with pytest.raises(QuantError, match="between 0 and 32"):
        target_bits("99bpw")


def test_embeddings_and_head_can_have_other_formats():
    chosen = with_parts(mixture("Q4_K_M", CONFIG), CONFIG, "q8", "q5k")
    assert chosen.formats["model.embed_tokens.weight"] == FORMATS["Q8_0"]
    assert chosen.formats["lm_head.weight"] == FORMATS["Q5_K"]
    tied = CONFIG.replace(tie_embeddings=True)
    chosen = with_parts(mixture("Q4_K_M", tied), tied, None, "q8")
    assert chosen.formats["model.embed_tokens.weight"] == FORMATS["Q8_0"]
    with pytest.raises(QuantError, match="do not divide"):
        with_parts(mixture("Q4_0", CONFIG), CONFIG.replace(dim=96), "q4k", None)
