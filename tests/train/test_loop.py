"""The loop against a float64 reference written out by hand, and its invariances."""

import math
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
import toy

from herd.errors import TrainingError
from herd.train import Loss, lm, metrics, objectives, sft, state, train
from herd.train.storage import RawFiles


def reference(model, stream, config):
    """Return losses and weights of training in float64, with one plain forward per step."""
    model = model.double()
    params = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    adam = config.optimizer
    b1, b2 = adam.betas
    losses = []
    for step in range(config.steps):
        batch = stream.batch(step * config.batch_size, config.batch_size)
        hidden = model(batch.tokens_BT, batch.positions_BT, batch.attend)
        logits = hidden @ model.lm_head.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in params.values()))
        with torch.no_grad():
            for name, p in params.items():
                grad = p.grad * min(1.0, adam.clip / norm)
                first[name] = b1 * first[name] + (1 - b1) * grad
                second[name] = b2 * second[name] + (1 - b2) * grad.square()
                m = first[name] / (1 - b1 ** (step + 1))
                v = second[name] / (1 - b2 ** (step + 1))
                lr = config.learning_rate(step)
                p -= lr * (adam.weight_decay * p * (p.ndim > 1) + m / (v.sqrt() + adam.eps))
    return losses, params


@pytest.mark.parametrize("stream", [toy.Counting(), toy.Masked()], ids=["plain", "packed"])
@pytest.mark.parametrize("clip", [0.3, 100.0])
def test_losses_and_weights_match_a_float64_reference(tmp_path, stream, clip):
    config = toy.config(micro_batch_size=2, clip=clip, eps=1e-3, average_every=0)
    ours = toy.model()
    train(ours, stream, lm, config, tmp_path)
    losses, params = reference(toy.model(), stream, config)
    assert [r["loss"] for r in metrics.read(tmp_path)] == pytest.approx(losses, abs=1e-5)
    for name, p in ours.named_parameters():
        assert (p - params[name]).abs().max() < 2e-6, name


def test_the_loss_falls_on_easy_rows(tmp_path):
    train(toy.model(), toy.Counting(), lm, toy.config(steps=60, batch_size=8), tmp_path)
    losses = [r["loss"] for r in metrics.read(tmp_path)]
    assert losses[0] > 4.4
    assert losses[-1] < 1.0


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_gradient_accumulation_is_exact(tmp_path, micro):
    """Rows train 1 to 4 tokens each: a mean of micro-batch means would differ in the first digit."""
    whole, cut = toy.model(), toy.model()
    base = {"batch_size": 8, "eps": 1e-3, "average_every": 0}
    train(whole, toy.Masked(), sft, toy.config(**base), tmp_path / "whole")
    train(cut, toy.Masked(), sft, toy.config(**base, micro_batch_size=micro), tmp_path / "cut")
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-6


def test_recomputation_changes_nothing(tmp_path):
    plain, recomputed = toy.model(), toy.model()
    names = list(recomputed.state_dict())
    train(plain, toy.Masked(), lm, toy.config(), tmp_path / "plain")
    train(recomputed, toy.Masked(), lm, toy.config(activation_checkpointing=True), tmp_path / "recomputed")
    assert toy.bits(plain) == toy.bits(recomputed)
    assert list(recomputed.state_dict()) == names
    assert "forward" not in vars(recomputed.model.layers[0])


def test_bf16_keeps_fp32_masters(tmp_path):
    wide, narrow = toy.model(), toy.model()
    train(wide, toy.Counting(), lm, toy.config(), tmp_path / "wide")
    train(narrow, toy.Counting(), lm, toy.config(dtype="bf16"), tmp_path / "narrow")
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    a, b = ([r["loss"] for r in metrics.read(tmp_path / name)] for name in ("wide", "narrow"))
    assert a != b
    assert a == pytest.approx(b, rel=0.02)


def test_average_is_the_mean_of_weights_during_decay(tmp_path):
    model, seen = toy.model(), {}
    config = toy.config(steps=9, decay_steps=5, average_every=2)

    def keep(record):
        seen[record["step"]] = {n: p.detach().clone().double() for n, p in model.named_parameters()}

    result = train(model, toy.Counting(), lm, config, tmp_path, on_step=keep)
    assert result.averaged == 3  # after steps 5, 7 and 9
    for name, p in model.named_parameters():
        mean = (seen[5][name] + seen[7][name] + seen[9][name]) / 3
        assert (p - mean).abs().max() < 1e-6, name


def test_decay_reaches_zero(tmp_path):
    model, seen = toy.model(), []
    config = toy.config(steps=8, decay_steps=8, warmup_steps=0, average_every=0)
    train(model, toy.Counting(), lm, config, tmp_path, on_step=lambda r: seen.append(r["lr"]))
    assert seen == pytest.approx([config.optimizer.lr * (8 - i) / 8 for i in range(8)])


def test_each_row_is_read_once_and_in_order(tmp_path):
    class Recorder(toy.Counting):
        rows: list[int] = []  # noqa: RUF012

        def batch(self, position, count):
            self.rows.extend(range(position, position + count))
            return super().batch(position, count)

    stream = Recorder()
    config = toy.config(micro_batch_size=2, start_position=100)
    result = train(toy.model(), stream, lm, config, tmp_path)
    assert stream.rows == list(range(100, 100 + 6 * 4))
    assert result.tokens == 6 * 4 * 16
    assert result.flops == pytest.approx(result.tokens * toy.MODEL.flops_per_token(8, training=True))


def test_log_has_what_a_reader_needs(tmp_path):
    config = toy.config(eval_every=2, log_every=2, peak_flops=1e12)
    train(toy.model(), toy.Counting(), lm, config, tmp_path, evaluate=lambda m, step: {"bpb": step * 1.0})
    records = metrics.read(tmp_path)
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6]
    assert [(r["step"], r["eval/bpb"]) for r in records if "eval/bpb" in r] == [(2, 2.0), (4, 4.0), (6, 6.0)]
    wanted = {"step", "loss", "lr", "grad_norm", "tokens", "targets", "tokens_per_s", "seconds", "mfu"}
    assert wanted <= records[0].keys()


def test_tensorboard_receives_the_numbers_of_each_step(tmp_path):
    pytest.importorskip("tensorboard")
    train(toy.model(), toy.Counting(), lm, toy.config(tensorboard=True), tmp_path)
    assert list((tmp_path / "tensorboard").iterdir())


def test_without_tensorboard_there_is_a_warning(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="tensorboard is not installed"):
        train(toy.model(), toy.Counting(), lm, toy.config(tensorboard=True), tmp_path)


def test_only_what_is_trainable_is_kept_and_averaged(tmp_path):
    def partly_frozen():
        model = toy.model()
        for name, param in model.named_parameters():
            param.requires_grad_("mlp" in name)
        return model

    whole = partly_frozen()
    before = {name: p.clone() for name, p in whole.named_parameters()}
    config = toy.config(save_every=2, keep_states=9)
    train(whole, toy.Counting(), lm, config, tmp_path)
    for name, p in whole.named_parameters():
        assert torch.equal(p, before[name]) == ("mlp" not in name), name
    for path in state.states(tmp_path):
        names = RawFiles(path).read_metadata().state_dict_metadata
        assert all("mlp" in name for name in names), path
        if path.name == "step-00000006":
            shutil.rmtree(path)
    resumed = partly_frozen()
    assert train(resumed, toy.Counting(), lm, config, tmp_path).resumed_from == 4
    assert toy.bits(resumed) == toy.bits(whole)


# What goes wrong --------------------------------------------------------------------------------------------


def nan_at(row):
    def objective(hidden_BTD, head, batch):
        loss = lm(hidden_BTD, head, batch)
        bad = (batch.tokens_BT[:, 0] == row * 7 % 96).any()
        return Loss(loss.total * (float("nan") if bad else 1.0), loss.denominator, {})

    return objective


def test_nan_loss_names_step_and_rows_and_keeps_the_state(tmp_path):
    model = toy.model()
    config = toy.config(micro_batch_size=2, save_every=1)
    with pytest.raises(TrainingError, match=r"loss is nan at step 4, rows 14 to 15, .* is kept") as error:
        train(model, toy.Counting(), nan_at(14), config, tmp_path)
    assert "\n" not in str(error.value)
    assert state.newest(tmp_path).name == "step-00000003"
    assert all(p.isfinite().all() for p in model.parameters())
    assert metrics.read(tmp_path)[-1]["step"] == 3


def test_infinite_gradient_is_not_applied(tmp_path):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    def objective(hidden_BTD, head, batch):
        loss = lm(hidden_BTD, head, batch)
        return loss._replace(total=Explode.apply(loss.total))

    model = toy.model()
    before = toy.bits(model)
    with pytest.raises(TrainingError, match="gradient norm is"):
        train(model, toy.Counting(), objective, toy.config(), tmp_path)
    assert toy.bits(model) == before


def test_a_step_that_trains_nothing_is_refused(tmp_path):
    class Empty(toy.Counting):
        def batch(self, position, count):
            plain = super().batch(position, count)
            plain.targets_BT.fill_(-100)
            return plain

    with pytest.raises(TrainingError, match="step 1, rows 0 to 3: no token is trained"):
        train(toy.model(), Empty(), sft, toy.config(), tmp_path)


def test_half_precision_masters_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"is bf16; master weights are fp32"):
        train(toy.model().bfloat16(), toy.Counting(), lm, toy.config(), tmp_path)


def test_context_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="context=128 exceeds the model's max_context=64"):
        train(toy.model(), toy.Counting(128), lm, toy.config(context=128), tmp_path)


def test_a_last_update_that_breaks_the_weights_is_an_error(tmp_path):
    config = toy.config(steps=1, lr=1e38, warmup_steps=0, decay_steps=0, average_every=0)
    with pytest.raises(TrainingError, match=r"the norm of the weights is .* with a lower lr than 1e\+38"):
        train(toy.model(), toy.Counting(), lm, config, tmp_path / "a")
    config = toy.config(eval_every=6)
    with pytest.raises(TrainingError, match="x is nan after step 6"):
        train(toy.model(), toy.Counting(), lm, config, tmp_path / "b", evaluate=lambda m, s: {"x": math.nan})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_and_saves(tmp_path, number, capsys):
    whole = toy.model()
    train(whole, toy.Counting(), lm, toy.config(), tmp_path / "whole")

    def press(record):
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    model, folder, before = toy.model(), tmp_path / "stopped", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 6"):
        train(model, toy.Counting(), lm, toy.config(), folder, on_step=press)
    assert "stopping after this step" in capsys.readouterr().err
    assert [path.name for path in state.states(folder)] == ["step-00000004"]
    assert signal.getsignal(signal.SIGINT) is before
    resumed = toy.model(seed=5)
    train(resumed, toy.Counting(), lm, toy.config(), folder)
    assert toy.bits(resumed) == toy.bits(whole)


def test_signatures_name_objectives_and_their_constants():
    assert objectives.signature(sft) == {"objective": "sft"}
    assert objectives.signature(lm) == {"objective": "lm"}


@pytest.mark.soak
def test_compiled_layers_train_to_the_same_losses(tmp_path):
    plain, compiled = toy.model(), toy.model()
    train(plain, toy.Counting(), lm, toy.config(eps=1e-3), tmp_path / "plain")
    train(compiled, toy.Counting(), lm, toy.config(eps=1e-3, compile=True), tmp_path / "compiled")
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5
