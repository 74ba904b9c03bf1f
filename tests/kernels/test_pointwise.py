"""RMSNorm, rotation and SwiGLU: native kernels against float64 torch, values and gradients, and recomputation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.kernels import build, pointwise
from herd.kernels.pointwise import plain_rms_norm, plain_rotate, plain_swiglu, rms_norm, rotate, swiglu
from herd.kernels.recompute import cheaply

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}
needs_native = pytest.mark.skipif(not build.ready(), reason="no C++ compiler")


def leaves(*shapes, dtype):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(ours, plain, inputs, dtype):
    """Values and gradients within the dtype's precision of the plain function in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, truth = ours(*inputs), plain(*wide)
    weights = torch.randn_like(truth)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, inputs, weights.to(dtype))
    for got, want in zip((y, *grads), (truth, *torch.autograd.grad(truth, wide, weights)), strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * (want.norm() + 1)


dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


@dtypes
@given(B=st.integers(1, 3), T=st.integers(1, 70), D=st.integers(8, 70))
@settings(max_examples=25, deadline=None)
def test_rms_norm_matches_float64(dtype, B, T, D):
    torch.manual_seed(B * T * D)
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: plain_rms_norm(x, w, 1e-5),
        leaves((B, T, D), (D,), dtype=dtype),
        dtype,
    )


@dtypes
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    H=st.integers(1, 3),
    half=st.integers(1, 20),
    shared=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_rotation_matches_float64(dtype, B, T, H, half, shared):
    torch.manual_seed(B * T * half)
    angles = torch.randn(1 if shared else B, T, 1, half, dtype=torch.float64).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    inputs = leaves((B, T, H, 2 * half), dtype=dtype)
    compare(
        lambda x: rotate(x, cos, sin), lambda x: plain_rotate(x, cos.double(), sin.double()), inputs, dtype
    )


@dtypes
@given(N=st.integers(1, 50), F=st.integers(1, 80))
@settings(max_examples=25, deadline=None)
def test_swiglu_matches_float64(dtype, N, F):
    torch.manual_seed(N * F)
    compare(swiglu, plain_swiglu, leaves((N, F), (N, F), dtype=dtype), dtype)


def test_swiglu_of_extreme_gates():
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30], requires_grad=True)
    up = torch.ones(7, requires_grad=True)
    y = swiglu(gate, up)
    torch.testing.assert_close(y, plain_swiglu(gate, up))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), (gate, up)))


def test_rotation_of_a_transposed_view_and_of_float64():
    x = torch.randn(2, 3, 5, 8).transpose(1, 2)
    angles = torch.randn(1, 5, 1, 4).repeat(1, 1, 1, 2)
    torch.testing.assert_close(
        rotate(x, angles.cos(), angles.sin()), plain_rotate(x, angles.cos(), angles.sin())
    )
    wide = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-5), wide)


def test_autocast_gives_the_matmul_its_own_type():
    x, weight = leaves((4, 6), (6,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(y.float(), plain_rms_norm(x, weight, 1e-5), rtol=1e-2, atol=1e-2)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.float().sum(), (x, weight)))


class MLP(torch.nn.Module):
    """Two matmuls share the norm's result, one has SwiGLU's: the places where recomputation happens."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(16))
        self.gate, self.up = torch.nn.Linear(16, 40), torch.nn.Linear(16, 40)
        self.down = torch.nn.Linear(40, 16)

    def forward(self, x):
        x = rms_norm(x, self.norm, 1e-5)
        return self.down(swiglu(self.gate(x), self.up(x)))


def gradients(module, x, *, retain=False):
    loss = module(x).square().sum()
    grads = torch.autograd.grad(loss, (x, *module.parameters()), retain_graph=retain)
    return (*grads, *(torch.autograd.grad(loss, (x, *module.parameters())) if retain else ()))


@needs_native
def test_recomputed_gradients_are_the_kept_ones_to_the_bit(monkeypatch):
    module, x = MLP(), torch.randn(3, 7, 16, requires_grad=True)
    kept = gradients(module, x)
    made = []
    native = torch.ops.herd_native.swiglu
    monkeypatch.setattr(pointwise, "_swiglu", lambda *pair: made.append(1) or native(*pair))
    with cheaply():
        recomputed = gradients(module, x, retain=True)
    assert len(made) == 1 + 2  # once forward, once for each backward
    for got, want in zip(recomputed, (*kept, *kept), strict=True):
        assert torch.equal(got, want)


@needs_native
def test_recomputation_keeps_less():
    module, x = MLP(), torch.randn(64, 16, requires_grad=True)

    def kept_numbers():
        sizes = {}
        nodes, seen = [module(x).grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            for name in dir(node):
                if name.startswith("_raw_saved"):
                    saved = getattr(node, name)
                    for one in saved if isinstance(saved, (tuple, list)) else [saved]:
                        if isinstance(one.data, torch.Tensor):
                            sizes[one.data.data_ptr()] = one.data.numel()
        return sum(sizes.values())

    with cheaply():
        less = kept_numbers()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x):
        all_of_them = kept_numbers()
    assert less == all_of_them - 64 * 16 - 64 * 40


def test_under_compile_the_plain_functions_are_traced():
    module, x = MLP(), torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(compiled, x), gradients(module, x), strict=True):
        torch.testing.assert_close(got, want)
