"""The model, its losses, a training step, decoding, quantized layers and the paged cache on CUDA against the CPU.

Every test computes the same thing twice in fp32 on the same weights. The CPU results are held to transformers and to
float64 elsewhere in the suite, so agreement with the CPU is agreement with them.
"""

import copy

import pytest
import torch

from herd.data.batch import Batch
from herd.engine import Engine, Request, Sampling
from herd.kernels.loss import linear_cross_entropy
from herd.kernels.page_layout import PAGE
from herd.llama.config import ModelConfig, RopeScaling
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.quant.random import random_quantized
from herd.train import AdamW, Cosine, TrainConfig, lm, train

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    512, 256, 3, 8, 2, 512, max_context=1024, rope_scaling=RopeScaling(factor=8.0, original_context=64)
)
TOLERANCE = 2e-4
"""Of logits of size about 1: two orders of summation in fp32, three layers deep."""


@pytest.fixture(scope="module")
def model() -> LlamaLM:
    return LlamaLM(CONFIG).init_weights(0, std=0.06)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 17, 300, 1000])
def test_logits_agree(model, length):
    tokens_BT = random_tokens(2, length)
    expected = model.logits(tokens_BT)
    got = copy.deepcopy(model).cuda().logits(tokens_BT.cuda()).cpu()
    assert (got - expected).abs().max() < TOLERANCE


def test_the_loss_and_its_gradients_agree(model):
    hidden_ND, weight_VD = torch.randn(300, 256), torch.randn(512, 256) * 0.06
    targets_N = random_tokens(300)
    targets_N[::7] = -100
    results = []
    for device in ("cpu", "cuda"):
        x, w = (t.clone().to(device).requires_grad_() for t in (hidden_ND, weight_VD))
        loss = linear_cross_entropy(x, w, targets_N.to(device))
        loss.backward()
        results.append([t.detach().cpu() for t in (loss, x.grad, w.grad)])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


class RandomRows:
    """Random training rows, a pure function of the position."""

    def batch(self, position: int, count: int) -> Batch:
        rows = [random_tokens(65, seed=1 + n) for n in range(position, position + count)]
        tokens_BT = torch.stack(rows)
        return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous())


def test_three_training_steps_agree(model, tmp_path):
    config = TrainConfig(
        steps=3,
        batch_size=4,
        context=64,
        optimizer=AdamW(lr=1e-3, eps=1e-3),
        schedule=Cosine(warmup_steps=1, decay_steps=1),
    )
    weights = []
    for device in ("cpu", "cuda"):
        trained = copy.deepcopy(model).to(device)
        train(trained, RandomRows(), lm, config, tmp_path / device)
        weights.append({name: p.detach().cpu() for name, p in trained.named_parameters()})
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_greedy_answers_agree_and_use_every_page_kind(model, kv):
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, PAGE, 2 * PAGE + 5)]
    requests = [Request(prompt, Sampling(max_tokens=24, temperature=0, logprobs=0)) for prompt in prompts]
    expected = Engine(model, None, kv=kv).run(requests)
    got = Engine(copy.deepcopy(model).cuda(), None, kv=kv).run(requests)
    tolerance = {"fp32": 1e-3, "bf16": 2e-2, "int8": 5e-2}[kv]  # what the cache rounds, then fp32's order
    for ours, theirs in zip(got, expected, strict=True):
        for here, there in zip(ours.logprobs, theirs.logprobs, strict=True):
            if here.id != there.id:  # from a near tie on, the answers may differ
                assert abs(here.logprob - there.logprob) < tolerance
                break
            assert abs(here.logprob - there.logprob) < tolerance


def test_many_sequences_at_once_are_answered_as_one_by_one(model):
    cuda = copy.deepcopy(model).cuda()
    requests = [
        Request(random_tokens(n, seed=n).tolist(), Sampling(max_tokens=16, temperature=0, logprobs=0))
        for n in range(1, 40, 3)
    ]
    alone = [Engine(cuda, None).run([request])[0] for request in requests]
    together = Engine(cuda, None).run(requests)
    agree = sum(a.ids == b.ids for a, b in zip(alone, together, strict=True))
    assert (
        agree >= len(requests) - 1
    )  # cuBLAS may choose another kernel for another batch: one near tie may turn


@torch.no_grad()
@pytest.mark.parametrize("format", ["q4", "q4k", "q8"])
def test_quantized_layers_agree(monkeypatch, format):
    monkeypatch.setenv(
        "HERD_ISA", "reference"
    )  # the CPU's kernels round activations to int8, the reference does not
    quantized = random_quantized(CONFIG, scheme(format), seed=1)
    tokens_BT = random_tokens(1, 40)
    expected = quantized.logits(tokens_BT)
    got = quantized.cuda().logits(tokens_BT.cuda()).cpu()
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
