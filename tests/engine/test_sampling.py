"""Sampling, compared with distributions computed in float64 by the definitions, and its randomness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine import Sampling
from herd.engine.sampling import most_likely, sample, uniform
from herd.errors import EngineError

V = 12
LOGITS = torch.linspace(2.5, -3, V)[torch.randperm(V, generator=torch.Generator().manual_seed(0))]


def sampled(logits_BV, samplings, seeds, steps) -> list[int]:
    """Return the tokens that the engine picks from these logits."""
    return sample(logits_BV, most_likely(logits_BV)[0], samplings, seeds, steps)


def allowed(logits, s: Sampling) -> torch.Tensor:
    """Return the distribution by definition, one filter after another, as in `transformers`' warpers."""
    p = (logits.double() / s.temperature).softmax(-1)
    if s.top_k:
        p[p < p.topk(s.top_k).values[-1]] = 0
        p /= p.sum()
    if s.top_p < 1:
        sorted_p, order = p.sort(descending=True)
        p[order[sorted_p.cumsum(0) - sorted_p >= s.top_p]] = 0
    if s.min_p:
        p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=1),
        Sampling(temperature=0.6),
        Sampling(temperature=2, top_k=4),
        Sampling(temperature=1, top_p=0.7),
        Sampling(temperature=1.4, min_p=0.2),
        Sampling(temperature=1.7, top_k=8, top_p=0.85, min_p=0.1),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_defined_frequencies(s):
    """χ² over 20,000 draws stays below the 99.99th percentile for 11 degrees of freedom."""
    n = 20_000
    drawn = sampled(LOGITS.expand(n, V), [s] * n, [7] * n, range(n))
    counts = torch.bincount(torch.tensor(drawn), minlength=V).double()
    expected = allowed(LOGITS, s) * n
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 37.4


def test_the_cuts_are_those_of_transformers():
    """The tokens that may be drawn are those of `transformers`' own warpers."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    for s in (
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=1, min_p=0.1),
    ):
        scores = warpers.TemperatureLogitsWarper(float(s.temperature))(None, LOGITS[None])
        if s.top_k:
            scores = warpers.TopKLogitsWarper(s.top_k)(None, scores)
        if s.top_p < 1:
            scores = warpers.TopPLogitsWarper(s.top_p)(None, scores)
        if s.min_p:
            scores = warpers.MinPLogitsWarper(s.min_p)(None, scores)
        assert torch.allclose(allowed(LOGITS, s), scores.double().softmax(-1)[0], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1e-6, 0.5, 1.0, 100.0]),
            st.integers(0, V),
            st.floats(0.01, 1),
            st.floats(0, 1),
            st.integers(-(2**70), 2**70),
            st.integers(0, 1000),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
def test_each_row_is_sampled_as_if_it_were_alone(rows, seed):
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed)) * 30
    samplings = [Sampling(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m, _, _ in rows]
    seeds, steps = [r[4] for r in rows], [r[5] for r in rows]
    together = sampled(logits, samplings, seeds, steps)
    for i, s in enumerate(samplings):
        assert sampled(logits[i : i + 1], [s], [seeds[i]], [steps[i]]) == [together[i]]
        if s.greedy:
            assert together[i] == int(logits[i].argmax())
        else:
            assert allowed(logits[i], s)[together[i]] >= 0


def test_top_k_one_and_tiny_temperature_are_greedy():
    best = int(LOGITS.argmax())
    for s in (
        Sampling(temperature=5, top_k=1),
        Sampling(temperature=1e-300),
        Sampling(temperature=9, top_p=1e-9),
    ):
        assert sampled(LOGITS.expand(50, V), [s] * 50, [1] * 50, range(50)) == [best] * 50


def test_forbidden_tokens_are_never_drawn():
    logits = LOGITS.clone()
    logits[:6] = -torch.inf
    drawn = sampled(logits.expand(2000, V), [Sampling(temperature=3)] * 2000, [0] * 2000, range(2000))
    assert min(drawn) >= 6


def test_uniform_is_uniform():
    u = torch.tensor([uniform(seed, step) for seed in range(50) for step in range(400)], dtype=torch.float64)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 55  # 99.99th percentile for 19 degrees of freedom
    assert abs(float(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1])) < 0.03


def test_rows_that_are_not_finite_are_told_apart():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[0.0, nan, 2.0], [0.0, 1.0, -inf], [0.0, inf, 1.0], [-inf, -inf, -inf], [3.0, 1.0, 2.0]]
    )
    best, finite = most_likely(logits)
    assert finite == [False, True, False, False, True]
    assert (best[1], best[4]) == (1, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be at least 0; 0 is greedy"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0}, "top_p=0 keeps no token"),
        ({"top_p": 1.1}, "top_p=1.1 must be between 0 and 1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": True}, "max_tokens=True must be an integer"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"stop": ("",)}, "non-empty"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 would divide by zero"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 must be at least 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 must be between -2 and 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty='x'"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\] must map token ids to numbers"),
        ({"logit_bias": {"1": 1}}, "token id of logit_bias='1' must be an integer"),
        ({"logit_bias": {-1: 1}}, "token id of logit_bias=-1 must be at least 0"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5=101 must be between -100 and 100"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias of token 5=inf must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(EngineError, match=message):
        Sampling(**fields)


def test_a_single_stop_string_needs_no_tuple():
    assert Sampling(stop="ab").stop == ("ab",)
