"""Speculation changes how fast tokens come and nothing about which."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.engine import Sampling
from herd.engine.sampling import distribution, draw, sample, uniform
from herd.engine.speculate import certain, guess_uniform, judge, judge_uniform, speed_up

V = 8


def chi2(counts, expected) -> float:
    kept = expected > 0
    assert not counts[~kept].any()
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


def random_p(seed: int, sharp: float = 1.0) -> torch.Tensor:
    return (torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp).softmax(-1)


def judged(p, q, n, guesses=None):
    """n tokens by the rule, each with a seed of its own: (did the guess stay, token)."""
    drawn = guesses or draw(q.expand(n, V), [guess_uniform(s, 0) for s in range(n)]).tolist()
    u_judge, u_draw = [judge_uniform(s, 0) for s in range(n)], [uniform(s, 0) for s in range(n)]
    return judge(p.expand(n, V), q.expand(n, V), drawn, u_judge, u_draw)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_distributed_as_the_model_says(seed):
    """χ² over 40,000 seeds at the 99.99th percentile for 7 degrees of freedom; acceptance is 1 - TV within 4 sigma."""
    n = 40_000
    p, q = random_p(seed, 2.0), random_p(seed + 100, 2.0)
    stays, tokens = judged(p, q, n)
    assert chi2(torch.bincount(torch.tensor(tokens), minlength=V).double(), p * n) < 29.9
    overlap = float(torch.minimum(p, q).sum())
    assert sum(stays) / n == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / n) ** 0.5)


def test_certain_guesses_and_forbidden_ones():
    n = 40_000
    p = random_p(1).clone()
    p[3] = 0
    p /= p.sum()
    for guess in (2, 3):
        q = certain([guess], p[None])[0]
        stays, tokens = judged(p, q, n, [guess] * n)
        assert chi2(torch.bincount(torch.tensor(tokens), minlength=V).double(), p * n) < 29.9
        assert any(stays) == (guess != 3)


@given(st.integers(0, 10**6), st.floats(0.1, 60))
def test_a_perfect_draft_is_always_right(seed, sharp):
    p = random_p(seed, sharp)
    assert all(judged(p, p, 50)[0])


def test_rule_by_definition():
    """Each number by hand: p = .5 .5, q = .8 .2; token 0 stays below .625, and only 1 can replace it."""
    p, q = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.8, 0.2]]).double()
    assert judge(p, q, [0], [0.62], [0.0]) == ([True], [0])
    assert judge(p, q, [0], [0.63], [0.0]) == ([False], [1])
    assert judge(p, q, [1], [0.999], [0.0]) == ([True], [1])


SETTINGS = [
    Sampling(temperature=1),
    Sampling(temperature=0.6, top_k=5),
    Sampling(temperature=2, top_p=0.8),
    Sampling(temperature=1.3, min_p=0.1, top_k=6, top_p=0.9),
]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_distribution_is_what_sample_draws_from(s):
    """`distribution` tells the truth about `sample`: χ² over 20,000 draws."""
    n = 20_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    p = distribution(logits[None], [s])[0]
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    drawn = sample(logits.expand(n, V), [s] * n, [3] * n, range(n))
    assert chi2(torch.bincount(torch.tensor(drawn), minlength=V).double(), p * n) < 29.9


def test_distributions_do_not_see_each_other():
    logits = torch.randn(len(SETTINGS), V, generator=torch.Generator().manual_seed(6)) * 2
    together = distribution(logits, SETTINGS)
    for i, s in enumerate(SETTINGS):
        assert torch.equal(together[i], distribution(logits[i : i + 1], [s])[0])


def test_guess_judge_and_draw_are_independent():
    u = torch.tensor(
        [[f(s, n) for f in (uniform, guess_uniform, judge_uniform)] for s in range(40) for n in range(100)]
    )
    assert float((torch.corrcoef(u.T) - torch.eye(3)).abs().max()) < 0.06


def test_speed_up_is_the_papers():
    """Leviathan et al., table 1 and section 3.2: operations aside, free draft, k guesses: 1 + a + ... + a^k tokens."""
    assert speed_up(0.8, 3, 0.0) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    assert speed_up(1.0, 4, 0.25) == pytest.approx(5 / 2)
    assert speed_up(0.0, 4, 0.05, verify_cost=1.3) == pytest.approx(1 / 1.5)
