"""The memory formulas against what torch keeps."""

from itertools import accumulate

import pytest
import torch

from herd.data.batch import Batch
from herd.kernels import build, recompute
from herd.kernels import loss as kernel
from herd.llama.config import SIZES, ModelConfig
from herd.llama.lora import add_lora
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.quant.linear import use_exact_products
from herd.quant.random import random_quantized
from herd.train import AdamW, Cosine, TrainConfig, lm, memory, train
from herd.train import state as states
from herd.train.parallel import prepared


def saved_bytes(model, tokens, monkeypatch) -> int:
    """Bytes of distinct storages that autograd keeps for backward, without parameters."""
    kept: dict[int, int] = {}
    params = {param.untyped_storage().data_ptr() for param in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    monkeypatch.setattr(recompute, "_keep", pack)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens)
    del out
    return sum(size for place, size in kept.items() if place not in params)


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler: plain torch keeps more")
@pytest.mark.parametrize("shape", [(128, 4, 2, 384), (96, 6, 2, 200)], ids=["a", "b"])
def test_kept_activations_are_predicted(shape, monkeypatch):
    dim, heads, kv, ffn = shape
    config = ModelConfig(64, dim, 4, heads, kv, ffn, head_dim=32)
    model, rows, context = LlamaLM(config).init_weights(0), 2, 128
    tokens = torch.randint(0, 64, (rows, context))
    measured = saved_bytes(model, tokens, monkeypatch)
    assert memory.activation_nbytes(config, rows, context) == pytest.approx(measured, rel=0.25)


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler: plain torch keeps more")
def test_checkpointed_activations_are_predicted(monkeypatch):
    """What is kept across blocks is one residual each."""
    config = ModelConfig(64, 128, 6, 4, 2, 384)
    model, rows, context = LlamaLM(config).init_weights(0), 2, 128
    tokens = torch.randint(0, 64, (rows, context))
    with prepared(model, activation_checkpointing=True, compiled=False):
        measured = saved_bytes(model, tokens, monkeypatch)
    block = memory.activation_nbytes(config.replace(n_layers=1), rows, context)
    predicted = memory.activation_nbytes(config, rows, context, activation_checkpointing=True)
    assert measured < predicted < measured + 1.1 * block


def test_state_bytes_are_those_on_the_disk(tmp_path):
    config = ModelConfig(256, 64, 2, 4, 2, 128, max_context=32)

    class Stream:
        def batch(self, position, count):
            tokens = torch.arange(position, position + count)[:, None] + torch.arange(16)[None]
            return Batch(tokens % 256, (tokens + 1) % 256)

    class Stop(BaseException):
        pass

    def stop(model, step):
        raise Stop

    model = LlamaLM(config).init_weights(0)
    plan = TrainConfig(
        steps=4,
        batch_size=2,
        context=16,
        optimizer=AdamW(lr=1e-3),
        schedule=Cosine(decay_steps=4, average_every=1),
        save_every=2,
        eval_every=3,
    )
    with pytest.raises(Stop):
        train(model, Stream(), lm, plan, tmp_path, evaluate=stop)
    assert (states.newest(tmp_path) / "rank-0.bin").stat().st_size == memory.state_nbytes(
        config, average=True
    )


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler: plain torch keeps more")
@pytest.mark.parametrize("packed", [False, True])
def test_the_peak_of_training_adapters_is_predicted(packed, tmp_path):
    """The sum of torch's allocations, as its profiler reports them. Small tensors count for more here."""
    config = ModelConfig(8192, 256, 3, 4, 2, 1024, max_context=512)
    model = random_quantized(config, scheme("q8")) if packed else LlamaLM(config).init_weights(0)
    if packed:
        use_exact_products(model)
    frozen = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    add_lora(model, 8, 2.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    class Stream:
        def batch(self, position, count):
            tokens = torch.arange(512)[None] % 256
            return Batch(tokens, tokens + 1)

    plan = TrainConfig(
        steps=2, batch_size=1, context=512, optimizer=AdamW(lr=1e-3), activation_checkpointing=packed
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        train(model, Stream(), lm, plan, tmp_path)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    peak = frozen + 4 * trained + max(accumulate(change for _, change in changes))
    predicted = memory.adapter_nbytes(config, frozen, trained, 1, 512, packed=packed)
    assert predicted == pytest.approx(peak, rel=0.1)


def test_large_models_need_the_published_bytes():
    """16 bytes per parameter, as the recipes say in their comments."""
    big = memory.train_nbytes(
        SIZES["405B"], 1, 8192, dtype="bf16", activation_checkpointing=True, shard=1024, ranks=1024
    )
    assert (big.weights + big.gradients + big.moments) / 1e9 == pytest.approx(6.34, abs=0.01)
    assert big.total < 80e9
    eight = memory.train_nbytes(
        SIZES["8B"], 4, 8192, dtype="bf16", activation_checkpointing=True, average=True, shard=8, ranks=64
    )
    assert (eight.weights + eight.gradients + eight.moments) / 1e9 == pytest.approx(16.06, abs=0.01)
    assert eight.total < 80e9


def test_the_chunk_of_the_loss_is_the_kernels_own():
    assert memory.LOSS_CHUNK_BYTES == kernel.CHUNK_BYTES
    assert memory.LOSS_TILE == kernel.TILE
    for config in (*SIZES.values(), ModelConfig(4096, 256, 5, 8, 4, 704)):
        head = torch.empty(config.vocab_size, config.dim, device="meta")
        assert memory.loss_chunk_tokens(config) == kernel._chunk_tokens(head)
