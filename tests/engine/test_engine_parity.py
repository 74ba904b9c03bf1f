"""One model, many ways to run it: full, cached, chunked, ragged-batched, packed, and `transformers` as the oracle."""

import pytest
import torch

from herd.engine import Engine, Request, Sampling, engine
from herd.engine.cache import KVCache
from herd.llama.attention import packed, packed_positions

KINDS = ["grouped", "ungrouped", "single", "scaled"]
TOLERANCE = 1e-4


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 259, (n,), generator=torch.Generator().manual_seed(seed))


def cached_logits(model, ids, cuts) -> torch.Tensor:
    """Logits of every token of one row: prefilled in chunks that end at ``cuts``, the rest decoded one by one."""
    cache = KVCache(model.config, torch.float32)
    cache.reserve(1, len(ids))
    cache.add_rows(1)
    out, start = [], 0
    for stop in cuts:
        positions = torch.arange(start, stop)[None]
        out.append(model.logits(ids[None, start:stop], positions, cache.prefill(0, start)))
        start = stop
    for at in range(start, len(ids)):
        out.append(model.logits(ids[None, at : at + 1], torch.tensor([[at]]), cache.decode([at])))
    return torch.cat(out, dim=1)[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_cached_equals_full(models, kind):
    model, ids = models[kind], tokens(300)
    full = model.logits(ids[None])[0]
    for cuts in ([1], [37], [64, 128], [256, 290], [5, 290]):
        assert (cached_logits(model, ids, cuts) - full).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_ragged_batch_equals_full(models, kind):
    model = models[kind]
    rows = [tokens(n, seed=n) for n in (1, 2, 31, 33, 90)]
    total = [len(r) + 20 for r in rows]
    rows = [torch.cat((r, tokens(20, seed=100 + i))) for i, r in enumerate(rows)]
    padded = torch.nn.utils.rnn.pad_sequence([r[:-20] for r in rows], batch_first=True)
    cache = KVCache(model.config, torch.float32)
    cache.reserve(len(rows), padded.shape[1])
    cache.add_rows(len(rows))
    prefilled = model.logits(padded, None, cache.prefill(0, 0))
    got = [[prefilled[b, : total[b] - 20]] for b in range(len(rows))]
    for step in range(20):
        positions = [n - 20 + step for n in total]
        cache.reserve(len(rows), max(positions) + 1)
        fed = torch.stack([r[p] for r, p in zip(rows, positions, strict=True)])[:, None]
        logits = model.logits(fed, torch.tensor(positions)[:, None], cache.decode(positions))
        for b in range(len(rows)):
            got[b].append(logits[b])
    for b, row in enumerate(rows):
        assert (torch.cat(got[b]) - model.logits(row[None])[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_packed_equals_cached(models, kind):
    model = models[kind]
    rows = [tokens(n, seed=n) for n in (3, 40, 17)]
    documents = torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)])[None]
    logits = model.logits(torch.cat(rows)[None], packed_positions(documents), packed(documents))[0]
    want = torch.cat([cached_logits(model, r, [1]) for r in rows])
    assert (logits - want).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def in_transformers(models):
    """The same weights in `transformers`."""
    transformers = pytest.importorskip("transformers")

    def build(kind):
        model, c = models[kind], models[kind].config
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        if c.rope_scaling:
            rope = {
                "rope_type": "llama3",
                "rope_theta": c.rope_theta,
                "factor": c.rope_scaling.factor,
                "low_freq_factor": c.rope_scaling.low_freq_factor,
                "high_freq_factor": c.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": c.rope_scaling.original_context,
            }
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_context,
            rope_parameters=rope,
            tie_word_embeddings=c.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.load_state_dict(model.state_dict(), strict=False)
        theirs.tie_weights()
        return theirs

    return build


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_transformers_agrees(models, in_transformers, kind):
    """Logits over a chunked prefill and decode, and the tokens of greedy `generate`, alone and in a batch."""
    model, theirs = models[kind], in_transformers(kind)
    ids = tokens(200)
    assert (cached_logits(model, ids, [100, 150]) - theirs(ids[None]).logits[0]).abs().max() <= TOLERANCE
    prompts = [tokens(n, seed=n).tolist() for n in (1, 9, 60)]
    ours = Engine(model, None).run([Request(p, Sampling(max_tokens=40)) for p in prompts])
    for prompt, completion in zip(prompts, ours, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert completion.ids == want[0, len(prompt) :].tolist()


@torch.inference_mode()
def test_long_prompts_go_in_chunks(model, monkeypatch):
    """The same tokens whatever the chunk, also where rows end in different chunks."""
    requests = [Request(tokens(n, seed=n).tolist(), Sampling(max_tokens=8)) for n in (290, 300, 310)]
    want = [Engine(model, None).run([r])[0].ids for r in requests]
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 3 * 37)
    monkeypatch.setattr(engine, "PADDING", 1e9)
    monkeypatch.setattr(engine, "_groups", lambda rows: [rows] if rows else [])
    assert [c.ids for c in Engine(model, None).run(requests)] == want
