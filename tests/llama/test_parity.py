"""The forward compared with transformers: for the same weights, logits agree within 1e-4 in fp32."""

import pytest
import torch
import torch.nn.functional as F
from llama_oracle import TinyCache, greedy, in_transformers, random_model

from herd.engine.cache import PagedCache
from herd.llama.attention import packed, packed_positions
from herd.llama.config import ModelConfig, RopeScaling

BAR = 1e-4
NEAR = RopeScaling(factor=8.0, original_context=64)  # most frequencies are scaled, lengths go far beyond it

OTHER_YARN = RopeScaling(
    3.5,
    original_context=100,
    kind="yarn",
    beta_fast=20.0,
    beta_slow=2.0,
    truncate=False,
    attention_factor=0.8,
)
FACTORS = RopeScaling(
    1.0, original_context=64, kind="factors", freq_factors=(1.0, 0.9, 3.0, 8.5), attention_factor=1.1
)
SIX, TWO = ModelConfig(101, 48, 2, 6, 3, 80), ModelConfig(101, 64, 2, 2, 1, 80, rope_theta=1e4)
CONFIGS = {
    "6 heads, 3 kv": SIX.replace(rope_scaling=NEAR),
    "5 heads, 1 kv, tied": ModelConfig(101, 40, 2, 5, 1, 72, tie_embeddings=True, rope_scaling=NEAR),
    "7 heads, 7 kv, no scaling": ModelConfig(101, 56, 2, 7, 7, 64, rope_theta=10_000.0),
    "head_dim 24, not dim / heads, tied": ModelConfig(101, 48, 2, 4, 2, 64, head_dim=24, tie_embeddings=True),
    "head_dim 64, Llama 3.1 scaling": ModelConfig(
        101, 96, 1, 3, 1, 96, head_dim=64, rope_scaling=RopeScaling()
    ),
    "1 head": ModelConfig(7, 8, 3, 1, 1, 8, norm_eps=1e-6),
    "linear": SIX.replace(rope_scaling=RopeScaling(2.5, kind="linear")),
    "yarn": TWO.replace(rope_scaling=RopeScaling(4.0, original_context=128, kind="yarn")),
    "yarn, other options": TWO.replace(n_kv_heads=2, rope_scaling=OTHER_YARN),
    "dynamic": SIX.replace(
        rope_theta=1e4, max_context=64, rope_scaling=RopeScaling(4.0, original_context=64, kind="dynamic")
    ),
    "frequency factors": SIX.replace(rope_scaling=FACTORS),
    "attention bias": SIX.replace(attention_bias=True),
    "mlp bias, head_dim 24, tied": ModelConfig(101, 48, 2, 4, 2, 64, 24, tie_embeddings=True, mlp_bias=True),
    "both biases": ModelConfig(101, 56, 2, 7, 7, 64, attention_bias=True, mlp_bias=True),
}
# A cached key keeps its rotation, while the base of dynamic scaling grows: only the whole forward can be
# compared beyond the context, in transformers as well.
CACHED = [name for name in CONFIGS if name != "dynamic"]


def tokens_of(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def max_diff(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_equal_transformers(name, attention):
    model = random_model(CONFIGS[name])
    reference = in_transformers(model, attention)
    for T in (1, 2, 3, 17, 130, 700):
        tokens_BT = tokens_of(model.config, 2 if T < 300 else 1, T, seed=T)
        logits_BTV = model.logits(tokens_BT)
        assert logits_BTV.std() > 0.5, "weights too weak to tell right from wrong"
        assert max_diff(logits_BTV, reference(tokens_BT).logits) <= BAR, T


@pytest.mark.parametrize("name", ["6 heads, 3 kv", "head_dim 64, Llama 3.1 scaling"])
@torch.no_grad()
def test_logits_equal_transformers_at_long_context(name):
    model = random_model(CONFIGS[name])
    tokens_BT = tokens_of(model.config, 1, 3000)
    assert max_diff(model.logits(tokens_BT), in_transformers(model)(tokens_BT).logits) <= BAR


@torch.no_grad()
def test_logits_equal_transformers_at_any_positions():
    model = random_model(CONFIGS["6 heads, 3 kv"])
    tokens_BT = tokens_of(model.config, 2, 40)
    positions_BT = torch.stack((torch.arange(40) + 100_000, torch.arange(40) * 7))
    theirs = in_transformers(model)(tokens_BT, position_ids=positions_BT).logits
    assert max_diff(model.logits(tokens_BT, positions_BT), theirs) <= BAR


@pytest.mark.parametrize(
    "name", ["6 heads, 3 kv", "5 heads, 1 kv, tied", "head_dim 24, not dim / heads, tied"]
)
@torch.no_grad()
def test_packed_documents_are_separate_runs(name):
    model = random_model(CONFIGS[name])
    reference = in_transformers(model)
    rows = [[13, 1, 50, 36], [100], [1] * 5 + [95]]
    documents_BT = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    )
    tokens_BT = tokens_of(model.config, *documents_BT.shape)
    ours_BTV = model.logits(tokens_BT, packed_positions(documents_BT), packed(documents_BT))
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            document_1T = tokens_BT[b : b + 1, start : start + length]
            part = ours_BTV[b : b + 1, start : start + length]
            assert max_diff(part, reference(document_1T).logits) <= BAR
            assert max_diff(part, model.logits(document_1T)) <= 1e-5
            start += length


@torch.no_grad()
def test_padded_rows_equal_transformers():
    """Rows of different lengths: padding on the right needs no mask, on the left positions and one document
    mask."""
    model = random_model(CONFIGS["6 heads, 3 kv"])
    reference = in_transformers(model)
    lengths = [1, 9, 33, 60]
    tokens_BT = tokens_of(model.config, len(lengths), max(lengths))
    right = model.logits(tokens_BT)
    real_BT = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths])
    left = model.logits(tokens_BT, (real_BT.cumsum(1) - 1).clamp(min=0), packed(real_BT.long()))
    theirs = reference(
        tokens_BT, attention_mask=real_BT.long(), position_ids=(real_BT.cumsum(1) - 1).clamp(min=0)
    )
    for b, n in enumerate(lengths):
        assert max_diff(right[b, :n], reference(tokens_BT[b : b + 1, :n]).logits[0]) <= BAR
        assert max_diff(left[b, -n:], reference(tokens_BT[b : b + 1, -n:]).logits[0]) <= BAR
        assert max_diff(left[b, -n:], theirs.logits[b, -n:]) <= BAR


@pytest.mark.parametrize(
    "name", ["6 heads, 3 kv", "7 heads, 7 kv, no scaling", "head_dim 64, Llama 3.1 scaling", "yarn"]
)
@pytest.mark.parametrize("steps", [[1] * 12, [50, 1, 1, 7, 1], [3, 90, 1]])
@torch.no_grad()
def test_decoding_from_a_cache_equals_the_full_forward(name, steps):
    model = random_model(CONFIGS[name])
    tokens_BT = tokens_of(model.config, 3, sum(steps))
    cache = TinyCache(model.config.n_layers)
    parts, start = [], 0
    for n in steps:
        positions_1T = torch.arange(start, start + n)[None]
        parts.append(model.logits(tokens_BT[:, start : start + n], positions_1T, cache.attend))
        start += n
    assert max_diff(torch.cat(parts, 1), in_transformers(model)(tokens_BT).logits) <= BAR


@pytest.mark.parametrize(
    "name", ["6 heads, 3 kv", "5 heads, 1 kv, tied", "head_dim 64, Llama 3.1 scaling", "yarn", "both biases"]
)
@torch.no_grad()
def test_the_engines_cache_equals_the_full_forward(name):
    """Rows of different lengths prefilled together, flattened, then each decoding at its own position."""
    model = random_model(CONFIGS[name])
    reference = in_transformers(model)
    lengths, n_new = [5, 71, 20], 6
    tokens_BT = tokens_of(model.config, len(lengths), max(lengths) + n_new)
    cache = PagedCache(model.config, "fp32", 64 << 20)
    rows = [cache.open() for _ in lengths]
    for step in range(n_new + 1):
        parts = [(row, n if step == 0 else 1) for row, n in zip(rows, lengths, strict=True)]
        fed = torch.cat([tokens_BT[b, row.length : row.length + n] for b, (row, n) in enumerate(parts)])[None]
        for row, n in parts:
            cache.grow(row, row.length + n)
        ours_NV = model.logits(fed, *cache.step(parts))[0]
        ends = torch.tensor([n for _, n in parts]).cumsum(0) - 1
        for b, row in enumerate(rows):
            assert (
                max_diff(ours_NV[ends[b]], reference(tokens_BT[b : b + 1, : row.length]).logits[0, -1]) <= BAR
            )


@pytest.mark.parametrize("name", CACHED)
def test_greedy_tokens_equal_transformers(name):
    model = random_model(CONFIGS[name])
    prompt = tokens_of(model.config, 5).tolist()
    prompt_BT = torch.tensor([prompt])
    theirs = in_transformers(model).generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=80,
        do_sample=False,
        eos_token_id=None,
    )
    assert greedy(model, prompt, 80) == theirs[0, 5:].tolist()


@pytest.mark.parametrize("name", ["5 heads, 1 kv, tied", "both biases"])
def test_gradients_equal_transformers(name):
    """The gradients of the loss agree with those of transformers for every parameter."""
    model = random_model(CONFIGS[name])
    reference = in_transformers(model)
    tokens_BT = tokens_of(model.config, 2, 30)
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[:, -1] = -100
    logits_NV = model.lm_head(model(tokens_BT)).flatten(0, 1)
    F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=-100).backward()
    reference(tokens_BT, labels=tokens_BT).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, param in model.named_parameters():
        grad = theirs[name].grad
        assert (param.grad - grad).abs().max() <= 1e-4 * max(1.0, float(grad.abs().max())), name
