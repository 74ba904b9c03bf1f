"""Random models have finite weights of a realistic size, the same in memory and in a file."""

import pytest
import torch

from herd.errors import QuantError
from herd.quant import FORMATS, blocks, scheme
from herd.quant.formats import BF16, F16, F32, TYPES
from herd.quant.linear import packed_weights
from herd.quant.random import random_quantized, random_rows, random_rows_of

KINDS = [*FORMATS.values(), F16, BF16, F32]


@pytest.mark.parametrize("format", KINDS, ids=str)
@pytest.mark.parametrize("row_length", [256, 4096, 53_248])
def test_weights_are_of_the_size_of_a_trained_matrix(format, row_length):
    weight = blocks.decode(random_rows((16, row_length), format, 3), format)
    size = weight.square().mean().sqrt() * row_length**0.5
    assert torch.isfinite(weight).all()
    assert (
        0.5 < size < (1.5 if row_length <= 4096 else 4)
    )  # in the widest, half precision ends the step's smallness
    assert weight.mean().abs() < 0.05 * weight.std()
    assert len(weight.unique()) > 100


def test_groups_of_a_block_have_different_scales():
    format = FORMATS["Q4_K"]
    rows = random_rows((4, 512), format, 0)
    weight = blocks.decode(rows, format).view(-1, 32)
    assert weight.std(dim=1).unique().numel() > 30  # groups differ in their scales


def test_a_seed_gives_the_same_weights_again(make_model):
    config, plan = make_model().config, scheme("q4")
    rows_of = random_rows_of(config, plan.plan(config), 5)
    for name, _, rows in packed_weights(random_quantized(config, plan, 5)):
        assert torch.equal(rows, rows_of(name)), name
    other = random_rows_of(config, plan.plan(config), 6)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(rows_of(up), other(up))
    assert not torch.equal(rows_of(up), rows_of(down))


@pytest.mark.parametrize("name", ["q4", "q8", "q4k", "q6k", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_random_models_give_finite_logits(make_model, name, tied):
    config, plan = make_model(tie_embeddings=tied, n_layers=8).config, scheme(name)
    seen: list[tuple[int, int]] = []
    model = random_quantized(config, plan, progress=lambda done, total: seen.append((done, total)))
    logits = model.logits(torch.arange(12)[None])
    assert 0.2 < logits.std() < 5
    assert seen[-1] == (plan.nbytes(config), plan.nbytes(config))


def test_formats_without_random_weights_are_refused():
    with pytest.raises(QuantError, match="IQ2_XS; choose F32, F16"):
        random_rows((4, 256), TYPES["IQ2_XS"], 0)
    with pytest.raises(QuantError, match="do not divide"):
        random_rows((4, 100), FORMATS["Q4_0"], 0)
