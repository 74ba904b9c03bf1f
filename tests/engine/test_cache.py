"""The cache's bytes, its growth, and rows that move into freed slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.cache import KVCache
from herd.engine.memory import BLOCK, nbytes
from herd.llama import SIZES, ModelConfig

TINY = ModelConfig(vocab_size=8, dim=4, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula(model, dtype):
    cache = KVCache(model.config, dtype)
    assert cache.nbytes == 0
    cache.reserve(3, 100)
    assert cache.capacity == 2 * BLOCK
    assert cache.nbytes == nbytes(model.config, 3, 100, dtype.itemsize)
    cache.release()
    assert cache.nbytes == 0


def test_published_size():
    """8B in bf16: 128 KiB a token, so 16 GiB for the whole context."""
    assert nbytes(SIZES["8B"], 1, 131_072) == 16 << 30


@torch.inference_mode()
def test_growing_keeps_what_is_there(model):
    cache = KVCache(model.config, torch.float32)
    cache.reserve(2, 10)
    cache.add_rows(2)
    for t in cache._keys + cache._values:
        t.normal_()
    before = [t.clone() for t in cache._keys + cache._values]
    cache.reserve(5, BLOCK + 1)
    for old, new in zip(before, cache._keys + cache._values, strict=True):
        assert torch.equal(new[:2, :, : old.shape[2]], old)
        assert not new[2:].any()
        assert not new[:, :, old.shape[2] :].any()


@torch.inference_mode()
def test_an_earlier_peak_is_given_back(model):
    """Many short sequences, then one long: room for one long, not for many."""
    cache = KVCache(model.config, torch.float32)
    cache.reserve(30, 64)
    cache.add_rows(30)
    cache.drop(range(1, 30), [5] * 30)
    cache.reserve(1, 10 * BLOCK)
    assert cache.nbytes == nbytes(model.config, 1, 10 * BLOCK, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dropping_keeps_the_others(data):
    """Rows are labelled by what their slot holds; after any drops, the moves and the slots tell the same story."""
    n = data.draw(st.integers(1, 9))
    dropped = data.draw(st.sets(st.integers(0, n - 1)))
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=n, max_size=n))
    cache = KVCache(TINY, torch.float32)
    cache.reserve(n, 8)
    cache.add_rows(n)
    for tensor in cache._keys + cache._values:
        for row in range(n):
            tensor[row, :, : lengths[row]] = row + 1
    labels = list(range(n))
    for source, target in cache.drop(sorted(dropped), lengths):
        labels[target] = labels[source]
    labels = labels[: cache.n_rows]
    assert sorted(labels) == sorted(set(range(n)) - dropped)
    for tensor in cache._keys + cache._values:
        for row, label in enumerate(labels):
            assert (tensor[row, :, : lengths[label]] == label + 1).all()
