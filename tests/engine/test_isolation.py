"""A request that fails ends alone, with an error that says why, and no other answer changes by a bit."""

import copy

import pytest
import torch

from herd.engine import Constraint, Engine, EngineLoop, Request, Sampling
from herd.engine.logits import LogitsProcessor
from herd.errors import EngineError
from herd.kernels.page_layout import PAGE
from herd.quant import scheme
from herd.quant.linear import swap_linears

GUILTY = 200
"""A token that no other request has in its prompt or its answer."""


@pytest.fixture(scope="module", params=["dense", "q4", "q8"])
def wide(request, make_model):
    model = make_model(seed=7, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96)
    return model if request.param == "dense" else swap_linears(model, scheme(request.param))


class DamagedEmbedding(torch.nn.Module):
    """An embedding in which one channel of the guilty token is ``bad``. It may be packed otherwise."""

    def __init__(self, whole: torch.nn.Module, bad: float) -> None:
        super().__init__()
        self.whole, self.bad = whole, bad

    def forward(self, tokens):
        x = self.whole(tokens).clone()
        x[..., 5] = torch.where(tokens == GUILTY, self.bad, x[..., 5])
        return x


def damaged(model, bad: float = float("nan")):
    model = copy.deepcopy(model)
    model.model.embed_tokens = DamagedEmbedding(model.model.embed_tokens, bad)
    return model


def good(i: int, n: int = 30) -> Request:
    prompt = [(7 * i + 3 * k) % 199 for k in range(5 + 40 * i)]
    bias = Sampling(max_tokens=n, temperature=1, seed=i, logprobs=2, logit_bias={GUILTY: -100})
    return Request(prompt, bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_a_damaged_embedding_ends_only_the_requests_with_its_token(wide, kv, bad):
    """The same batch twice, with the embedding whole and damaged: all logprobs of the others are equal."""
    guilty = [Request([1] * 70 + [GUILTY] * n, Sampling(max_tokens=1)) for n in (1, 3)]
    requests = [good(0), guilty[0], good(1), good(2), guilty[1], good(3)]
    whole = Engine(wide, None, kv=kv).run(requests)
    engine = Engine(damaged(wide, bad), None, kv=kv)
    streams = [engine.submit(request) for request in requests]
    for i, (stream, want) in enumerate(zip(streams, whole, strict=True)):
        if requests[i] in guilty:
            with pytest.raises(EngineError, match="logits are not finite numbers"):
                stream.completion()
        else:
            assert stream.completion() == want


def test_the_same_in_a_loop_that_goes_on(wide):
    with EngineLoop(Engine(damaged(wide), None)) as loop:
        for turn in range(3):
            some = [loop.submit(good(i))[0] for i in range(3)]
            guilty = loop.submit(Request([turn, GUILTY]))[0]
            with pytest.raises(EngineError, match="not finite"):
                guilty.completion()
            assert [each.completion().finish_reason for each in some] == ["length"] * 3
            assert guilty.usage.completion_tokens == 0


@pytest.mark.parametrize("where", ["process", "push"])
@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_an_exception_of_a_logits_processor_ends_its_request(
    make_model, tokenizer, monkeypatch, where, draft
):
    model = make_model()
    how = {"draft": make_model(4, n_layers=1) if draft == "model" else draft}
    requests = [
        good(0),
        Request([5], Sampling(max_tokens=20, logit_bias={3: 1}), stop_ids=frozenset({258})),
        good(1),
    ]
    requests[1].sampling.logit_bias[4] = 1.0  # of all the processors this one alone has a bias of token 4
    want = Engine(model, tokenizer, **how).run(requests)
    real = getattr(LogitsProcessor, where)

    def faulty(self, argument):
        if 4 in self._sampling.logit_bias and sum(self._answer.values()) >= 3:
            raise ZeroDivisionError("three tokens\nare enough")
        return real(self, argument)

    monkeypatch.setattr(LogitsProcessor, where, faulty)
    engine = Engine(model, tokenizer, **how)
    streams = [engine.submit(request) for request in requests]
    with pytest.raises(EngineError, match="cannot be continued: ZeroDivisionError: three tokens are enough"):
        streams[1].completion()
    assert [streams[0].completion().ids, streams[2].completion().ids] == [want[0].ids, want[2].ids]
    assert engine.cache.pages.n_used == engine.n_active == 0


def test_a_full_cache_ends_the_request_that_needs_another_page(make_model):
    """Such a bound contradicts the engine's own rule, so it must not end the others."""
    engine = Engine(make_model(), None, max_batch=1)
    engine.cache.pages.limit = engine.cache.pages.capacity = 2
    long, short = engine.submit(Request([1] * 100, Sampling(max_tokens=100))), engine.submit(good(1))
    with pytest.raises(EngineError, match="the cache is full: all 2 pages are in use"):
        long.completion()
    assert len(short.completion().ids) == 30
    assert engine.cache.pages.n_used == 0
    assert long.usage.completion_tokens == 2 * PAGE - 100 + 1  # the last one was not fed


def test_a_constraint_that_nothing_satisfies_ends_its_request_in_the_loop(make_model, tokenizer):
    with EngineLoop(Engine(make_model(), tokenizer)) as loop:
        impossible = Constraint.json_schema({"type": "string", "minLength": 3, "maxLength": 2})
        bad, fine = loop.submit(Request([1], constraint=impossible))[0], loop.submit(good(1))[0]
        with pytest.raises(EngineError, match="JSON schema"):
            bad.completion()
        assert fine.completion().finish_reason in ("length", "stop")
