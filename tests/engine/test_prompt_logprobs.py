"""Log-probabilities of the prompt's own tokens, compared with a float64 forward over the whole prompt."""

import random

import pytest
import torch

from herd.engine import Engine, EngineLoop, Request, Sampling
from herd.engine import engine as module
from herd.engine.score import Pair, Scorer
from herd.errors import EngineError
from herd.kernels.page_layout import PAGE


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(n)]


def expected(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(torch.tensor([ids])).double().log_softmax(-1)[0]


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_they_are_the_softmax_of_the_full_forward_in_any_batch(
    make_model, model, tokenizer, draft, monkeypatch
):
    """In small pieces, after pages ran out, behind a cached prompt, and with few logits at a time."""
    monkeypatch.setattr(module, "MIXED_TOKENS", 37)
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * model.config.vocab_size * 10)
    draft_model = make_model(4, n_layers=1) if draft == "model" else draft
    engine = Engine(model, tokenizer, draft=draft_model)
    engine.cache.pages.limit = 4
    prompts = [prompt(n, n) for n in (1, 2, 64, 65, 150)] + [prompt(150, 150)]
    engine.run([Request(prompts[-1], Sampling(max_tokens=1))])  # its pages are found by content now
    requests = [Request(ids, Sampling(max_tokens=140), prompt_logprobs=2) for ids in prompts]
    plain = [Request(ids, Sampling(max_tokens=140)) for ids in prompts]
    done = engine.run([*requests, *plain])
    assert engine.n_preempted > 0
    assert [c.ids for c in done[:6]] == [c.ids for c in done[6:]]
    assert all(c.prompt_logprobs is None for c in done[6:])
    for ids, completion in zip(prompts, done, strict=False):
        logp = expected(model, ids)
        got = completion.prompt_logprobs
        assert [p.id for p in got] == ids[1:]
        for row, p in zip(logp, got, strict=False):
            best = row.topk(2)
            assert p.logprob == pytest.approx(float(row[p.id]), abs=1e-4)
            assert [i for i, _ in p.top] == best.indices.tolist()
            assert [v for _, v in p.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_they_sum_to_the_score_of_the_scorer(model, tokenizer):
    ids = prompt(120)
    done = Engine(model, tokenizer).run([Request(ids, Sampling(max_tokens=1), prompt_logprobs=0)])[0]
    ((_, (scored,)),) = Scorer(model).score([[Pair(ids[:50], ids[50:])]])
    assert sum(p.logprob for p in done.prompt_logprobs[49:]) == pytest.approx(scored.nats, abs=1e-3)
    assert done.prompt_logprobs[0].top == ()


def test_such_a_prompt_is_computed_anew_and_found_by_the_next(model, tokenizer):
    engine, ids = Engine(model, tokenizer), prompt(3 * PAGE)
    ask = lambda top: engine.run([Request(ids, Sampling(max_tokens=1), prompt_logprobs=top)])[0]  # noqa: E731
    assert [ask(top).shared_tokens for top in (0, None, 5, None)] == [0, 2 * PAGE, 0, 2 * PAGE]


def test_they_come_before_the_first_delta_of_a_generation(model, tokenizer):
    ids = prompt(300)
    with EngineLoop(Engine(model, tokenizer)) as loop:
        generation = loop.submit(Request(ids, Sampling(max_tokens=5), prompt_logprobs=1))[0]
        next(generation)
        assert len(generation.prompt_logprobs) == 299


@pytest.mark.parametrize("wrong", [-1, 300, 1.5, True])
def test_impossible_numbers_are_refused(model, tokenizer, wrong):
    with pytest.raises(EngineError, match="prompt_logprobs="):
        Engine(model, tokenizer).submit(Request([1], prompt_logprobs=wrong))
