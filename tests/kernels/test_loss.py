"""The chunked losses against plain float64 torch: values, gradients, edges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.kernels import loss as losses
from herd.kernels.loss import SampledTargets, linear_cross_entropy, linear_distil, linear_sampled_distil


def plain_cross_entropy(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=-100)


def plain_kl(student, student_weight, teacher, teacher_weight, mask, tau=1.0):
    log_p = F.log_softmax(teacher.detach() @ teacher_weight.detach().T / tau, dim=-1)
    log_q = F.log_softmax(student @ student_weight.T / tau, dim=-1)
    return tau * tau * ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum()


def leaves(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def targets_for(N, V, ignored=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=generator)
    return torch.where(torch.rand(N, generator=generator) < ignored, -100, targets)


def grads(loss, *inputs, scale=0.37):
    return torch.autograd.grad(loss * scale, inputs, allow_unused=True)


@pytest.fixture(params=[1, 7, 10_000], ids=lambda chunk: f"chunk{chunk}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "_chunk_tokens", lambda weight: request.param)


@given(
    N=st.integers(1, 40),
    D=st.integers(1, 9),
    V=st.integers(2, 50),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.1]),
)
@settings(max_examples=40, deadline=None)
def test_cross_entropy_is_the_plain_one_in_float64(N, D, V, ignored):
    hidden, weight = leaves((N, D), (V, D))
    targets = targets_for(N, V, ignored)
    ours, plain = linear_cross_entropy(hidden, weight, targets), plain_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads(ours, hidden, weight), grads(plain, hidden, weight))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_cross_entropy_in_chunks_and_for_one_input_alone(needs):
    hidden, weight = leaves((23, 6), (31, 6))
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    targets = targets_for(23, 31)
    ours, plain = linear_cross_entropy(hidden, weight, targets), plain_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads(ours, *inputs), grads(plain, *inputs))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_kl_is_the_plain_one_in_float64(tau):
    student, student_weight, teacher, teacher_weight = leaves((23, 6), (31, 6), (23, 9), (31, 9))
    targets = targets_for(23, 31)
    ours = linear_distil(student, student_weight, targets, teacher, teacher_weight, tau).total
    plain = plain_kl(student, student_weight, teacher, teacher_weight, targets != -100, tau)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads(ours, student, student_weight), grads(plain, student, student_weight))
    ours = linear_distil(student, student_weight, targets, teacher, teacher_weight).total
    assert grads(ours, teacher, teacher_weight) == (None, None)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_distil_mixes_both_over_one_set_of_logits(kl_weight, tau):
    student, student_weight, teacher, teacher_weight = leaves((23, 6), (31, 6), (23, 9), (31, 9))
    targets = targets_for(23, 31)
    ours = linear_distil(student, student_weight, targets, teacher, teacher_weight, tau, kl_weight)
    ce = plain_cross_entropy(student, student_weight, targets)
    kl = plain_kl(student, student_weight, teacher, teacher_weight, targets != -100, tau)
    torch.testing.assert_close((ours.ce, ours.kl), (ce.detach(), kl.detach()))
    total = kl_weight * kl + (1 - kl_weight) * ce
    torch.testing.assert_close(ours.total, total)
    torch.testing.assert_close(
        grads(ours.total, student, student_weight), grads(total, student, student_weight)
    )


def test_nothing_trained_is_zero_with_zero_gradients():
    hidden, weight, teacher, teacher_weight = leaves((5, 4), (9, 4), (5, 3), (9, 3))
    for loss in (
        linear_cross_entropy(hidden, weight, torch.full((5,), -100)),
        linear_distil(hidden, weight, torch.full((5,), -100), teacher, teacher_weight).total,
    ):
        assert loss.item() == 0
        hidden_grad, weight_grad = grads(loss, hidden, weight)
        assert (hidden_grad.shape, weight_grad.shape) == (hidden.shape, weight.shape)
        assert not hidden_grad.any()
        assert not weight_grad.any()


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient():
    hidden, weight = leaves((11, 6), (17, 6), dtype=torch.float32)
    targets = torch.zeros(11, dtype=torch.int64)
    loss = linear_distil(hidden, weight, targets, hidden.detach(), weight.detach()).total
    assert abs(loss.item()) < 1e-5
    assert all(grad.abs().max() < 1e-6 for grad in grads(loss, hidden, weight))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_inputs_stay_close_to_float64(dtype, tolerance):
    hidden, weight = leaves((64, 16), (300, 16), dtype=dtype)
    targets = targets_for(64, 300)
    ours = linear_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plain = plain_cross_entropy(*wide, targets)
    assert ours.item() == pytest.approx(plain.item(), rel=tolerance)
    for ours_grad, plain_grad in zip(grads(ours, hidden, weight), grads(plain, *wide), strict=True):
        assert ours_grad.dtype == dtype
        assert (ours_grad.double() - plain_grad).norm() < tolerance * plain_grad.norm()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tau, kl_weight", [(1.0, 1.0), (2.0, 0.3)])
def test_narrow_distillation_stays_close_to_float64(dtype, tolerance, tau, kl_weight):
    student, student_weight, teacher, teacher_weight = leaves(
        (64, 16), (300, 16), (64, 8), (300, 8), dtype=dtype
    )
    targets = targets_for(64, 300)
    ours = linear_distil(student, student_weight, targets, teacher, teacher_weight, tau, kl_weight)
    wide = [x.detach().double().requires_grad_() for x in (student, student_weight, teacher, teacher_weight)]
    truth = linear_distil(*wide[:2], targets, *wide[2:], tau, kl_weight)
    for got, want in zip(ours, truth, strict=True):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=tolerance)
    ours_grads, true_grads = grads(ours.total, student, student_weight), grads(truth.total, *wide[:2])
    for got, want in zip(ours_grads, true_grads, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_outside_the_vocabulary_is_an_error(dtype, target):
    hidden, weight = leaves((3, 4), (9, 4), dtype=dtype)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, torch.tensor([1, target, 2]))


def test_backward_a_second_time_is_refused_not_wrong():
    hidden, weight = leaves((5, 4), (9, 4), dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets_for(5, 9, 0)) / 5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_huge_logits_stay_finite():
    hidden, weight = leaves((8, 4), (50, 4), dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets_for(8, 50, 0))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads(loss, hidden, weight))


def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    hidden, weight = leaves((32, 16), (100, 16), dtype=torch.float32)
    targets = targets_for(32, 100)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    plain = plain_cross_entropy(hidden, weight, targets)
    assert loss.item() != plain.item()
    assert loss.item() == pytest.approx(plain.item(), rel=2e-2)
    assert all(grad.dtype == torch.float32 for grad in grads(loss, hidden, weight))


def test_without_gradients_none_are_made():
    hidden, weight = leaves((32, 16), (100, 16))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets_for(32, 100))
    assert not loss.requires_grad


class Packed:
    """A head that hands out its weight in pieces, as a quantized one does."""

    def __init__(self, weight_VD):
        self.weight_VD, self.asked = weight_VD.detach(), []
        self.out_features, self.in_features = weight_VD.shape

    def weight_rows(self, start, stop):
        self.asked.append((start, stop))
        return self.weight_VD[start:stop]


@pytest.mark.usefixtures("chunk")
def test_a_packed_head_gives_the_same_loss_and_gradient_a_tile_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "TILE", 16 * 6)
    hidden, weight, teacher, teacher_weight = leaves((23, 6), (70, 6), (23, 9), (70, 9))
    targets, packed = targets_for(23, 70), Packed(weight)
    ours, plain = (linear_cross_entropy(hidden, w, targets) for w in (packed, weight))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads(ours, hidden), grads(plain, hidden))
    assert {(start % 16, stop - start) for start, stop in packed.asked} == {(0, 16), (0, 6)}
    for student, of in ((packed, Packed(teacher_weight)), (weight, Packed(teacher_weight))):
        ours = linear_distil(hidden, student, targets, teacher, of, 2.0, 0.3)
        plain = linear_distil(hidden, weight, targets, teacher, teacher_weight, 2.0, 0.3)
        torch.testing.assert_close(ours, plain)
        inputs = (hidden, weight) if student is weight else (hidden,)
        torch.testing.assert_close(grads(ours.total, *inputs), grads(plain.total, *inputs))
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, packed, targets).requires_grad


def drawn(N, V, n_draws, seed=3):
    """Return draws from random distributions, and the distributions (N, V)."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(2 * torch.randn(N, V, generator=generator, dtype=torch.float64), -1)
    draws = torch.multinomial(p, n_draws, replacement=True, generator=generator)
    counts = torch.zeros(N, V, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones_like(p[:, :1]).expand(N, n_draws)
    )
    J = int((counts > 0).sum(1).max())
    weights, ids = counts.topk(J, dim=1)
    return SampledTargets(ids, weights / n_draws, p.gather(1, ids).log()), p


def plain_sampled(hidden, weight, targets, sampled, kl_weight, reverse):
    log_q = F.log_softmax(hidden @ weight.T, -1)
    trained = targets != -100
    log_ratio = log_q.gather(1, sampled.ids_NJ) - sampled.log_p_NJ
    ratio = log_ratio.exp()
    each = ratio * log_ratio - ratio + 1 if reverse else -log_ratio
    kl = ((sampled.weights_NJ * each).sum(1) * trained).sum()
    ce = F.nll_loss(log_q, targets, reduction="sum", ignore_index=-100)
    return kl_weight * kl + (1 - kl_weight) * ce, ce, kl


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kl_weight", [1.0, 0.6, 0.0])
def test_sampled_distillation_is_the_plain_formula_in_float64(kl_weight, reverse):
    hidden, weight = leaves((23, 6), (31, 6))
    targets, (sampled, _) = targets_for(23, 31), drawn(23, 31, 9)
    ours = linear_sampled_distil(hidden, weight, targets, sampled, kl_weight, reverse=reverse)
    plain = plain_sampled(hidden, weight, targets, sampled, kl_weight, reverse)
    torch.testing.assert_close(tuple(ours), plain)
    torch.testing.assert_close(grads(ours.total, hidden, weight), grads(plain[0], hidden, weight))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_whole_distribution_as_a_sample_is_the_whole_divergence(reverse):
    student, weight, teacher, teacher_weight = leaves((11, 6), (17, 6), (11, 9), (17, 9))
    targets = targets_for(11, 17)
    log_p = F.log_softmax(teacher.detach() @ teacher_weight.detach().T, -1)
    everything = SampledTargets(torch.arange(17).expand(11, 17), log_p.exp(), log_p)
    sampled = linear_sampled_distil(student, weight, targets, everything, 0.7, reverse=reverse)
    full = linear_distil(student, weight, targets, teacher, teacher_weight, 1.0, 0.7, reverse=reverse)
    torch.testing.assert_close(tuple(sampled), tuple(full))
    torch.testing.assert_close(grads(sampled.total, student, weight), grads(full.total, student, weight))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_mean_gradient_of_samples_is_that_of_the_whole_distribution(reverse):
    """The error of the mean of R gradients must fall like 1 / sqrt(R): there is no bias that remains."""
    hidden, weight = leaves((1, 4), (12, 4))
    _, p = drawn(1, 12, 1)
    everything = SampledTargets(torch.arange(12)[None], p, p.log())
    target = torch.tensor([2])
    whole = grads(linear_sampled_distil(hidden, weight, target, everything, reverse=reverse).total, hidden)[0]
    many = 40_000
    copies = hidden.detach().expand(many, 4).clone().requires_grad_()
    draws = torch.multinomial(
        p[0], many * 3, replacement=True, generator=torch.Generator().manual_seed(0)
    ).view(many, 3)
    sampled = SampledTargets(draws, torch.full(draws.shape, 1 / 3), p[0].log()[draws])
    loss = linear_sampled_distil(copies, weight.detach(), target.expand(many), sampled, reverse=reverse)
    each = grads(loss.total, copies)[0]
    error = (each.mean(0) - whole[0]).abs()
    assert (error < 5 * each.std(0) / many**0.5).all()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("tau, kl_weight", [(1.0, 1.0), (2.0, 0.5)])
def test_reverse_kl_is_the_plain_one_in_float64(tau, kl_weight):
    student, weight, teacher, teacher_weight = leaves((23, 6), (31, 6), (23, 9), (31, 9))
    targets = targets_for(23, 31)
    log_p = F.log_softmax(teacher.detach() @ teacher_weight.detach().T / tau, -1)
    log_q = F.log_softmax(student @ weight.T / tau, -1)
    kl = tau**2 * ((log_q.exp() * (log_q - log_p)).sum(-1) * (targets != -100)).sum()
    ce = plain_cross_entropy(student, weight, targets)
    plain = kl_weight * kl + (1 - kl_weight) * ce
    ours = linear_distil(student, weight, targets, teacher, teacher_weight, tau, kl_weight, reverse=True)
    torch.testing.assert_close(tuple(ours), (plain, ce, kl))
    torch.testing.assert_close(grads(ours.total, student, weight), grads(plain, student, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_narrow_sampled_distillation_stays_close_to_float64(dtype, tolerance):
    wide = leaves((64, 32), (200, 32))
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    targets, (sampled, _) = targets_for(64, 200), drawn(64, 200, 20)
    ours = linear_sampled_distil(*narrow, targets, sampled, 0.8)
    plain = plain_sampled(*wide, targets, sampled, 0.8, reverse=False)
    torch.testing.assert_close(ours.total.double(), plain[0], rtol=tolerance, atol=0)
    for own, exact in zip(grads(ours.total, *narrow), grads(plain[0], *wide), strict=True):
        assert (own.double() - exact).norm() < tolerance * exact.norm()
