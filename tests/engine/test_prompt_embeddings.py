"""Embeddings of prompts, compared with a float64 mean over the hidden states of the whole prompt."""

from __future__ import annotations

import pytest
import torch
from test_prompt_logprobs import prompt

from herd.engine import Engine, EngineLoop, Request, Sampling
from herd.engine import engine as module
from herd.errors import EngineError


def expected(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        mean_D = model(torch.tensor([ids]))[0].double().mean(0)
    return mean_D / mean_D.norm()


def ask(ids: list[int], **more) -> Request:
    return Request(ids, Sampling(max_tokens=1), embeds=True, **more)


def embedded(engine, requests, n_steps=0) -> list[list[float]]:
    """Return the embeddings. After some steps, one of which a part is computed has to begin again."""
    streams = [engine.submit(request) for request in requests]
    for _ in range(n_steps):
        engine.step()
    if n_steps:
        begun = [each for each in engine.scheduler.active if each.hidden_sum_D is not None]
        engine.scheduler._preempt(begun[-1])
    for stream in streams:
        (last,) = stream
        assert (last.finish_reason, last.token_ids) == ("stop", ())
        assert stream.usage.completion_tokens == 0
    return [stream.embedding for stream in streams]


def test_they_are_the_mean_of_the_full_forward_in_any_batch(model, tokenizer, monkeypatch):
    """In small pieces, after a second beginning, behind the same prompt as a request, and among running answers."""
    monkeypatch.setattr(module, "MIXED_TOKENS", 37)
    engine = Engine(model, tokenizer)
    prompts = [prompt(n, n) for n in (150, 150, 1, 2, 64, 65)]
    engine.run([Request(prompts[0], Sampling(max_tokens=1))])
    answers = [engine.submit(Request(prompt(60, n), Sampling(max_tokens=90))) for n in range(2)]
    engine.step()
    got = embedded(engine, map(ask, prompts), n_steps=5)
    assert engine.n_preempted == 1
    for ids, embedding in zip(prompts, got, strict=True):
        torch.testing.assert_close(torch.tensor(embedding).double(), expected(model, ids), atol=1e-5, rtol=0)
    alone = Engine(model, tokenizer).run([answer.request for answer in answers])
    assert [answer.completion().ids for answer in answers] == [each.ids for each in alone]


def test_their_pages_push_out_no_cached_prompt_and_nobody_waits_for_them(model, tokenizer):
    engine = Engine(model, tokenizer)
    findable = engine.cache.pages.n_findable
    embedded(engine, [ask(prompt(150, n)) for n in range(4)])
    assert engine.cache.pages.n_findable == findable
    stream = engine.submit(ask(prompt(150)))
    answer = engine.submit(Request(prompt(150), Sampling(max_tokens=1)))
    engine.step()
    assert answer.began
    assert (stream.done, answer.done) == (True, True)


def test_by_a_loop_and_a_failure_alone(make_model, tokenizer):
    model = make_model()
    with EngineLoop(Engine(model, tokenizer)) as loop:
        (generation,) = loop.submit(ask(prompt(300)))
        assert [delta.finish_reason for delta in generation] == ["stop"]
        torch.testing.assert_close(
            torch.tensor(generation.embedding).double(), expected(model, prompt(300)), atol=1e-5, rtol=0
        )
        with torch.no_grad():
            model.model.embed_tokens.weight[5] = torch.nan
        (bad,), (good,) = loop.submit(ask([1, 5])), loop.submit(ask([1, 2]))
        with pytest.raises(EngineError, match="not finite"):
            list(bad)
        assert [delta.finish_reason for delta in good] == ["stop"]
