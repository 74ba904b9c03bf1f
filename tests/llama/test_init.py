"""Initial weights: a function of the seed alone, of which a rank can draw its own rows."""

import pytest
import torch

from herd.llama import ModelConfig, fill
from herd.llama.model import LlamaLM

SHAPE = ModelConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_context=32)


@pytest.mark.parametrize("at_once", [1, 7 * 5, 1000])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7, 13])
def test_the_rows_of_all_ranks_together_are_the_whole_matrix(monkeypatch, at_once, n_ranks):
    monkeypatch.setattr(fill, "DRAWN_AT_ONCE", at_once)
    whole = fill.normal_rows((12, 5), seed=3, start=0, stop=12)
    each = -(-12 // n_ranks)
    bounds = [(min(rank * each, 12), min((rank + 1) * each, 12)) for rank in range(n_ranks)]
    parts = [fill.normal_rows((12, 5), 3, start, stop) for start, stop in bounds]
    assert torch.equal(torch.cat(parts), whole)


def test_blocks_and_seeds_give_different_numbers(monkeypatch):
    monkeypatch.setattr(fill, "DRAWN_AT_ONCE", 5)
    first, other = (fill.normal_rows((40, 5), seed, 0, 40) for seed in (3, 4))
    assert len(torch.cat((first, other)).flatten().unique()) == 400
    assert abs(float(first.std()) - 1) < 0.15


def test_a_rank_draws_little_more_than_its_own_rows(monkeypatch):
    monkeypatch.setattr(fill, "DRAWN_AT_ONCE", 10 * 8)
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda shape, **kwargs: (drawn.append(shape[0]), randn(shape, **kwargs))[1]
    )
    fill.normal_rows((1000, 8), 0, 505, 525)
    assert sum(drawn) == 30


def test_initial_weights_have_the_deviations_of_their_kind():
    model = LlamaLM(SHAPE).init_weights(0)
    for name, param in model.named_parameters():
        if param.ndim == 1:
            assert bool((param == 1).all())
            continue
        expected = (
            0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        )  # 0.02 / sqrt(2 · 2)
        assert float(param.detach().std()) == pytest.approx(expected, rel=0.2), name


def test_biases_begin_at_zero():
    plain = LlamaLM(SHAPE).init_weights(3)
    biased = LlamaLM(SHAPE.replace(attention_bias=True, mlp_bias=True)).init_weights(3)
    biases = [param for name, param in biased.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 7 * SHAPE.n_layers
    assert not any(param.any() for param in biases)
    assert (plain.model.norm.weight == biased.model.norm.weight).all()
