"""A model gives the same logits in one forward, cached, in pieces, batched, packed, and in `transformers`."""

import pytest
import torch

from herd.checkpoint.hf import config_to_hf
from herd.engine import Engine, Request, Sampling, engine
from herd.engine.cache import PagedCache
from herd.llama.attention import packed, packed_positions

KINDS = ["grouped", "ungrouped", "single", "scaled"]
TOLERANCE = 1e-4


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 259, (n,), generator=torch.Generator().manual_seed(seed))


def paged(model) -> PagedCache:
    return PagedCache(model.config, "fp32", 64 << 20)


def feed(model, cache, parts) -> torch.Tensor:
    """Return logits (N, V) of the next tokens of some sequences: ``parts`` are (sequence, its ids)."""
    for cached, ids in parts:
        cache.grow(cached, cached.length + len(ids))
    positions, attend = cache.step([(cached, len(ids)) for cached, ids in parts])
    return model.logits(torch.cat([ids for _, ids in parts])[None], positions, attend)[0]


def cached_logits(model, ids, cuts) -> torch.Tensor:
    """Return logits of every token of a sequence: prefilled up to the last of ``cuts``, then decoded."""
    cache = paged(model)
    cached, ends = cache.open(), [*cuts, *range(cuts[-1] + 1, len(ids) + 1)]
    return torch.cat(
        [feed(model, cache, [(cached, ids[a:b])]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_cached_forward_equals_the_full_one(models, kind):
    model, ids = models[kind], tokens(300)
    full = model.logits(ids[None])[0]
    for cuts in ([1], [37], [64, 128], [256, 290], [5, 290]):
        assert (cached_logits(model, ids, cuts) - full).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_ragged_batch_equals_the_full_forward(models, kind):
    """Prompts of all lengths, in pieces of different sizes, and single tokens share one forward."""
    model = models[kind]
    rows = [tokens(n, seed=n) for n in (21, 22, 51, 90, 190)]
    cache = paged(model)
    sequences = [cache.open() for _ in rows]
    got = [[] for _ in rows]
    for step in range(200):
        parts = []
        for b, (row, cached) in enumerate(zip(rows, sequences, strict=True)):
            n = (1, 7, 1, 64, 33)[(b + step) % 5]
            if cached.length < len(row):
                parts.append((b, cached, row[cached.length : cached.length + n]))
        if not parts:
            break
        logits = feed(model, cache, [part[1:] for part in parts]).split([len(ids) for _, _, ids in parts])
        for (b, _, _), part in zip(parts, logits, strict=True):
            got[b].append(part)
    for b, row in enumerate(rows):
        assert (torch.cat(got[b]) - model.logits(row[None])[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_packed_documents_equal_cached_ones(models, kind):
    model = models[kind]
    rows = [tokens(n, seed=n) for n in (3, 40, 17)]
    documents = torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)])[None]
    logits = model.logits(torch.cat(rows)[None], packed_positions(documents), packed(documents))[0]
    want = torch.cat([cached_logits(model, r, [1]) for r in rows])
    assert (logits - want).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def in_transformers(models):
    """Return the same weights as a `transformers` model."""
    transformers = pytest.importorskip("transformers")

    def build(kind):
        model = models[kind]
        config = transformers.LlamaConfig(**config_to_hf(model.config, dtype="float32"))
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.load_state_dict(model.state_dict(), strict=False)
        theirs.tie_weights()
        return theirs

    return build


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_transformers_gives_the_same_logits(models, in_transformers, kind):
    """Logits of a chunked prefill and decode agree, and so do greedy answers, alone and in a batch."""
    model, theirs = models[kind], in_transformers(kind)
    ids = tokens(200)
    assert (cached_logits(model, ids, [100, 150]) - theirs(ids[None]).logits[0]).abs().max() <= TOLERANCE
    prompts = [tokens(n, seed=n).tolist() for n in (1, 9, 60)]
    ours = Engine(model, None).run([Request(p, Sampling(max_tokens=40)) for p in prompts])
    for prompt, completion in zip(prompts, ours, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert completion.ids == want[0, len(prompt) :].tolist()


@torch.inference_mode()
def test_a_long_prompt_read_in_pieces_gives_the_same_answer(model, monkeypatch):
    """Tokens do not depend on the size of the pieces, also where prompts end in different pieces."""
    requests = [Request(tokens(n, seed=n).tolist(), Sampling(max_tokens=8)) for n in (290, 300, 310)]
    want = [Engine(model, None).run([r])[0].ids for r in requests]
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 111)
    monkeypatch.setattr(engine, "MIXED_TOKENS", 17)
    assert [c.ids for c in Engine(model, None).run(requests)] == want
