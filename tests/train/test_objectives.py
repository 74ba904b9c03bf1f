"""Objectives against float64 arithmetic written out."""

import pytest
import torch.nn.functional as F
import toy

from herd.errors import TrainingError
from herd.train import distil, lm, sft, train
from herd.train.objectives import batch_loss


def logits64(model, batch):
    model = model.double()
    return model(batch.tokens_BT, batch.positions_BT, batch.attend) @ model.lm_head.weight.T


def test_sft_counts_only_the_unmasked():
    batch = toy.Masked().batch(0, 4)
    loss = batch_loss(toy.model(), sft, batch)
    logits = logits64(toy.model(), batch)
    total, count = 0.0, 0
    for row in range(4):
        for t in range(16):
            if batch.targets_BT[row, t] != -100:
                total -= F.log_softmax(logits[row, t], -1)[batch.targets_BT[row, t]].item()
                count += 1
    assert int(loss.denominator) == count == 1 + 2 + 3 + 4
    assert loss.total.item() == pytest.approx(total, rel=1e-6)


def test_sft_gradient_is_zero_where_nothing_can_see_a_target():
    """Rows whose targets are all masked give no gradient at all."""
    model, batch = toy.model(), toy.Masked().batch(0, 4)
    batch.targets_BT.fill_(-100)
    batch.targets_BT[0, 3] = 5
    batch_loss(model, sft, batch).total.backward()
    grad = model.model.embed_tokens.weight.grad.abs().sum(-1)
    seen = set(batch.tokens_BT[0, :4].tolist())
    assert set(grad.nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_distillation_matches_float64_arithmetic(tau, kl_weight):
    teacher = toy.model(seed=1, dim=48, n_layers=1, n_heads=6)
    batch = toy.Masked().batch(3, 4)
    student = toy.model()
    loss = batch_loss(student, distil(teacher, kl_weight=kl_weight, tau=tau), batch)
    loss.total.backward()
    reference = toy.model()
    ours, theirs = logits64(reference, batch).flatten(0, 1), logits64(teacher, batch).flatten(0, 1).detach()
    targets = batch.targets_BT.flatten()
    keep = targets != -100
    log_q, log_p = F.log_softmax(ours / tau, -1)[keep], F.log_softmax(theirs / tau, -1)[keep]
    kl = tau**2 * (log_p.exp() * (log_p - log_q)).sum()
    ce = F.cross_entropy(ours[keep], targets[keep], reduction="sum")
    want = kl_weight * kl + (1 - kl_weight) * ce
    want.backward()
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-5)
    assert loss.metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-5, abs=1e-5)
    assert loss.metrics["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    for (name, a), b in zip(student.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4 * max(1.0, b.grad.abs().max()), name
    assert all(p.grad is None for p in teacher.parameters())


def test_distil_from_an_identical_teacher_is_zero():
    student, teacher = toy.model(), toy.model()
    loss = batch_loss(student, distil(teacher), toy.Counting().batch(0, 4))
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-4
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5


def test_distil_brings_the_student_to_its_teacher(tmp_path):
    teacher = toy.model()
    train(teacher, toy.Counting(), lm, toy.config(steps=40), tmp_path / "teacher")
    before = toy.bits(teacher)
    student, records = toy.model(seed=3, dim=16, ffn_dim=24, n_heads=2, n_kv_heads=1), []
    objective = distil(teacher)
    result = train(
        student, toy.Counting(), objective, toy.config(steps=60), tmp_path / "s", on_step=records.append
    )
    assert records[-1]["kl"] < records[0]["kl"] / 4
    assert records[-1]["loss"] == pytest.approx(records[-1]["kl"])
    assert toy.bits(teacher) == before
    own = student.config.flops_per_token(8, training=True)
    assert result.flops == pytest.approx(result.tokens * (own + teacher.config.flops_per_token(8)))


def test_distillation_refuses_other_vocabularies_and_impossible_weights():
    with pytest.raises(TrainingError, match="student's vocabulary is 96, its teacher's 64"):
        batch_loss(toy.model(), distil(toy.model(vocab_size=64)), toy.Counting().batch(0, 1))
    with pytest.raises(TrainingError, match=r"kl_weight=1.5 must be between 0"):
        distil(toy.model(), kl_weight=1.5)
    with pytest.raises(TrainingError, match=r"tau=0 must be positive"):
        distil(toy.model(), tau=0)
