"""The attention kernel against float64 torch: values, gradients, documents, head shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.kernels import attention as module
from herd.kernels import build
from herd.kernels.attention import attention, plain_attention

needs_native = pytest.mark.skipif(not build.ready(), reason="no C++ compiler")


def inputs(B, T, H, G, K, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, K)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def starts_of(lengths_B, T):
    """First token of each token's document, for rows cut into documents of these lengths and a last one."""
    rows = []
    for lengths in lengths_B:
        begins, at = torch.zeros(T, dtype=torch.int64), 0
        for length in lengths:
            at = min(at + length, T)
            begins[at:] = at
        rows.append(begins)
    return torch.stack(rows)


def compare(q, k, v, starts, tolerance):
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, truth = attention(q, k, v, starts), plain_attention(*wide, starts)
    weights = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, (q, k, v), weights.to(out.dtype))
    truths = torch.autograd.grad(truth, wide, weights)
    for got, want in zip((out, *grads), (truth, *truths), strict=True):
        assert got.dtype == q.dtype
        assert (got.double() - want).norm() <= tolerance * (want.norm() + 1)


@needs_native
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 200),
    G=st.integers(1, 3),
    R=st.integers(1, 3),
    K=st.sampled_from([16, 32, 48, 64, 80, 128]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_with_and_without_documents(B, T, G, R, K, data):
    lengths = data.draw(st.lists(st.lists(st.integers(1, 90), max_size=8), min_size=B, max_size=B))
    starts = data.draw(st.sampled_from([None, starts_of(lengths, T)]))
    compare(*inputs(B, T, G * R, G, K, torch.float32, seed=T), starts, 1e-5)


@needs_native
def test_bf16_inputs_are_computed_in_fp32():
    compare(*inputs(2, 130, 4, 2, 64, torch.bfloat16), None, 1e-2)


@needs_native
def test_large_scores_stay_finite():
    q, k, v = (x.detach() for x in inputs(1, 150, 2, 1, 16, torch.float32))
    out = attention(q * 300, k * 300, v)
    assert out.isfinite().all()
    torch.testing.assert_close(out, plain_attention(q.double() * 300, k.double() * 300, v.double()).float())


@needs_native
def test_the_native_kernel_runs_where_it_can(monkeypatch):
    q, k, v = inputs(1, 8, 2, 1, 16, torch.float32)
    assert "_Attention" in type(attention(q, k, v).grad_fn).__name__
    monkeypatch.setattr(module, "_native", lambda *_: False)
    assert "_Attention" not in type(attention(q, k, v).grad_fn).__name__


@pytest.mark.parametrize("K, dtype", [(6, torch.float32), (64, torch.float64)])
def test_other_head_dims_and_types_take_torchs_own(K, dtype):
    q, k, v = inputs(2, 9, 4, 2, K, dtype)
    starts = starts_of([[4], [2, 3]], 9)
    torch.testing.assert_close(attention(q, k, v, starts), plain_attention(q, k, v, starts))


@needs_native
def test_under_compile_it_is_one_opaque_operator():
    q, k, v = inputs(2, 20, 2, 1, 16, torch.float32)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    ours, plain = compiled(q, k, v), attention(q, k, v)
    torch.testing.assert_close(ours, plain)
    for got, want in zip(
        torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got, want)
