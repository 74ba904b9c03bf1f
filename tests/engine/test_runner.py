"""Layers as one native operator give the same bits as the model's own forward."""

import pytest
import torch

from herd.engine.cache import PagedCache
from herd.engine.runner import ModelRunner
from herd.kernels import qmatmul
from herd.quant import scheme
from herd.quant.linear import fused_layers, swap_linears

needs_native = pytest.mark.skipif(not qmatmul.here(), reason="no native kernels here")
STEPS = [[70, 3], [1, 1], [1, 9], [130, 1]]
"""Tokens of two sequences, step by step: prompts, decoding, both together, across a page."""


def hidden(model, kind: str, *, whole: bool) -> list[torch.Tensor]:
    cache = PagedCache(model.config, kind, 1 << 24)
    runner = ModelRunner(model, cache)
    assert runner._layers is not None
    if whole:
        runner._layers = None
    rows, generator, out = [cache.open(), cache.open()], torch.Generator().manual_seed(0), []
    for counts in STEPS:
        for row, n in zip(rows, counts, strict=True):
            cache.grow(row, row.length + n)
        tokens = torch.randint(model.config.vocab_size, (sum(counts),), generator=generator).tolist()
        with torch.inference_mode():
            out.append(runner(list(zip(rows, counts, strict=True)), tokens))
    return out


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant", "kind"), [("q4", "bf16"), ("q8", "int8"), ("q4k", "fp32")])
def test_layers_in_one_operator_gives_the_same_bits_as_the_model(make_model, quant, kind, dtype):
    plain = make_model(3, dim=256, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=512)
    model = swap_linears(plain.to(dtype), scheme(quant))
    for fused, own in zip(hidden(model, kind, whole=False), hidden(model, kind, whole=True), strict=True):
        assert fused.dtype == dtype
        assert torch.equal(fused, own)


@needs_native
def test_progress_is_told_layer_by_layer_in_steps_that_take_long(make_model):
    plain, other = (
        make_model(3, dim=256, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=512) for _ in range(2)
    )
    for model, short in ((plain, [0, 1, 2]), (swap_linears(other, scheme("q4")), [0])):
        cache, told = PagedCache(model.config, "bf16", 1 << 24), []
        row = cache.open()
        for n, expected in ((70, [0, 1, 2]), (1, short)):
            cache.grow(row, row.length + n)
            told.clear()
            with torch.inference_mode():
                ModelRunner(model, cache)([(row, n)], [7] * n, on_layer=told.append)
            assert told == expected


def test_a_model_with_a_plain_matrix_runs_its_own_forward(make_model):
    model = make_model(3)
    assert fused_layers(model) is None
