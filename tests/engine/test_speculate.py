"""Speculation changes how fast tokens are generated, and nothing about which."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.engine import Engine, Request, Sampling
from herd.engine.constraint import Constraint
from herd.engine.logits import LogitsProcessor
from herd.engine.sampling import distribution, draw, most_likely, sample, uniform
from herd.engine.speculate import DraftTokens, draft_uniform, one_hot, reject, verify_uniform
from herd.errors import EngineError

V = 8


def sampled(logits_BV, samplings, seeds, steps) -> list[int]:
    """Return the tokens that the engine picks from these logits."""
    return sample(logits_BV, most_likely(logits_BV)[0], samplings, seeds, steps)


def chi2(counts, expected) -> float:
    kept = expected > 0
    assert not counts[~kept].any()
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


def random_p(seed: int, sharp: float = 1.0) -> torch.Tensor:
    return (
        torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp
    ).softmax(-1)


def verified(p, q, n, draft_tokens=None):
    """Apply the rule to n draft tokens, each with its own seed. Return (whether each is accepted, tokens)."""
    drawn = draft_tokens or draw(q.expand(n, V), [draft_uniform(s, 0) for s in range(n)]).tolist()
    u_verify, u_draw = [verify_uniform(s, 0) for s in range(n)], [uniform(s, 0) for s in range(n)]
    return reject(p.expand(n, V), q.expand(n, V), drawn, u_verify, u_draw)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_distributed_as_the_model_says(seed):
    """χ² over 40,000 seeds (99.99th percentile, 7 degrees of freedom). Acceptance is 1 - TV within 4
    sigma."""
    n = 40_000
    p, q = random_p(seed, 2.0), random_p(seed + 100, 2.0)
    accepted, tokens = verified(p, q, n)
    assert chi2(torch.bincount(torch.tensor(tokens), minlength=V).double(), p * n) < 29.9
    overlap = float(torch.minimum(p, q).sum())
    assert sum(accepted) / n == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / n) ** 0.5)


def test_looked_up_tokens_are_verified_and_impossible_ones_rejected():
    n = 40_000
    p = random_p(1).clone()
    p[3] = 0
    p /= p.sum()
    for draft_token in (2, 3):
        q = one_hot([draft_token], p[None])[0]
        accepted, tokens = verified(p, q, n, [draft_token] * n)
        assert chi2(torch.bincount(torch.tensor(tokens), minlength=V).double(), p * n) < 29.9
        assert any(accepted) == (draft_token != 3)


@given(st.integers(0, 10**6), st.floats(0.1, 60))
def test_a_perfect_draft_is_always_accepted(seed, sharp):
    p = random_p(seed, sharp)
    assert all(verified(p, p, 50)[0])


def test_the_rejection_rule_by_hand():
    """With p = .5 .5 and q = .8 .2, token 0 is accepted below .625, and only token 1 can replace it."""
    p, q = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.8, 0.2]]).double()
    assert reject(p, q, [0], [0.62], [0.0]) == ([True], [0])
    assert reject(p, q, [0], [0.63], [0.0]) == ([False], [1])
    assert reject(p, q, [1], [0.999], [0.0]) == ([True], [1])


SETTINGS = [
    Sampling(temperature=1),
    Sampling(temperature=0.6, top_k=5),
    Sampling(temperature=2, top_p=0.8),
    Sampling(temperature=1.3, min_p=0.1, top_k=6, top_p=0.9),
]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_distribution_is_what_sample_draws_from(s):
    """`sample` draws from `distribution`: χ² over 20,000 draws."""
    n = 20_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    p = distribution(logits[None], [s])[0]
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    drawn = sampled(logits.expand(n, V), [s] * n, [3] * n, range(n))
    assert chi2(torch.bincount(torch.tensor(drawn), minlength=V).double(), p * n) < 29.9


def test_each_rows_distribution_is_the_same_alone():
    logits = torch.randn(len(SETTINGS), V, generator=torch.Generator().manual_seed(6)) * 2
    together = distribution(logits, SETTINGS)
    for i, s in enumerate(SETTINGS):
        assert torch.equal(together[i], distribution(logits[i : i + 1], [s])[0])


def test_drafting_verifying_and_drawing_use_independent_numbers():
    u = torch.tensor(
        [[f(s, n) for f in (uniform, draft_uniform, verify_uniform)] for s in range(40) for n in range(100)]
    )
    assert float((torch.corrcoef(u.T) - torch.eye(3)).abs().max()) < 0.06


# In the engine
# -------------------------------------------------------------------------------------------------------


class Poor:
    """A draft that is wrong at every fifth token of the model's own answer, known from a plain run."""

    def __init__(self, answers: dict[int, list[int]]) -> None:
        self.answers, self.forgotten = answers, []

    def propose(self, rows, most):
        out = []
        for row, n in zip(rows, most, strict=True):
            own = self.answers[row.number][row.n_new : row.n_new + n]
            out.append(
                DraftTokens(
                    [token if (row.n_new + i) % 5 else (token + 1) % 256 for i, token in enumerate(own)]
                )
            )
        return out

    def forget(self, row):
        self.forgotten.append(row.number)


@pytest.fixture(scope="module")
def drafts(model, make_model):
    """Drafts from useless to perfect."""
    return {
        "ngram": "ngram",
        "other": make_model(9),
        "smaller": make_model(4, n_layers=1, dim=24),
        "itself": model,
    }


def mixed(n: int) -> list[Request]:
    """Greedy requests of all lengths with everything that may end them or change their logits."""
    rng = random.Random(3)
    out = []
    for i in range(n):
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 90))] * rng.choice([1, 2])
        sampling = Sampling(
            max_tokens=rng.randrange(1, 60),
            stop=("e", "zq") if i % 5 == 4 else (),
            logprobs=2 if i % 3 == 0 else None,
            repetition_penalty=1.3 if i % 4 == 1 else 1.0,
            frequency_penalty=0.5 if i % 4 == 2 else 0.0,
            logit_bias={65: 2.0} if i % 4 == 3 else {},
        )
        constraint = Constraint.regex("[a-y ]{5,40}") if i % 6 == 5 else None
        out.append(
            Request(prompt, sampling, frozenset({7, 90}) if i % 2 else frozenset(), constraint=constraint)
        )
    return out


def outcomes(completion):
    """Return everything that must be equal."""
    c = completion
    return c.ids, c.text, c.finish_reason, c.stop_id


@pytest.mark.parametrize("name", ["ngram", "other", "smaller", "itself"])
def test_greedy_answers_are_the_same_with_a_draft(model, tokenizer, drafts, name):
    requests = mixed(24)
    want = Engine(model, tokenizer).run(requests)
    for k, max_batch in ((1, 24), (4, 5), (7, 1)):
        engine = Engine(model, tokenizer, max_batch=max_batch, draft=drafts[name], draft_tokens=k)
        got = engine.run(requests)
        assert [outcomes(c) for c in got] == [outcomes(c) for c in want]
        for ours, theirs in zip(got, want, strict=True):
            for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                assert (a.id, a.logprob) == (b.id, pytest.approx(b.logprob, abs=1e-3))
        assert engine.cache.pages.n_used == 0
        if name != "ngram":
            assert engine.draft.cache.pages.n_used == 0
        stats = [c.speculated for c in got]
        assert all(s.accepted <= s.verified <= s.drafted for s in stats)
        if name == "itself":
            # a draft token is rejected only where rounding decides between equals
            assert sum(s.accepted for s in stats) >= 0.99 * sum(s.verified for s in stats) > 0


def test_greedy_answers_are_the_same_when_some_draft_tokens_are_wrong(model, tokenizer):
    requests = [Request([i, i + 1], Sampling(max_tokens=50)) for i in range(6)]
    want = Engine(model, tokenizer).run(requests)
    draft = Poor({i: c.ids for i, c in enumerate(want)})
    got = Engine(model, tokenizer, draft=draft, draft_tokens=3).run(requests)
    assert [outcomes(c) for c in got] == [outcomes(c) for c in want]
    assert all(0.5 < c.speculated.acceptance_rate < 1 for c in got if len(c.ids) == 50)
    assert sorted(draft.forgotten) == list(range(6))


TINY = {
    "vocab_size": 5, "dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 24,
    "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("draft", "how"),
    [
        ("model", {}),
        ("model", {"top_k": 3, "repetition_penalty": 1.5, "temperature": 1.4}),
        ("ngram", {"presence_penalty": 0.7}),
    ],
    ids=str,
)
def test_sampled_sequences_have_the_models_distribution(make_model, draft, how):
    """χ² of all 125 answers of three tokens over 6,000 seeds, compared with products of plain forwards."""
    model, n = make_model(1, std=0.6, **TINY), 6000
    other = make_model(2, std=0.6, **TINY) if draft == "model" else "ngram"
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    sampling = Sampling(max_tokens=4, **({"temperature": 1.0} | how))
    requests = [Request(prompt, replace(sampling, seed=seed)) for seed in range(n)]
    done = Engine(model, None, max_batch=500, draft=other, draft_tokens=3).run(requests)
    counts = Counter(tuple(c.ids[:3]) for c in done)
    sequences = list(itertools.product(range(5), repeat=3))
    with torch.inference_mode():
        logits = model.logits(torch.tensor([prompt + list(s) for s in sequences]))[:, len(prompt) - 1 : -1]
    expected = []
    for s, rows in zip(sequences, logits, strict=True):
        processor, p = LogitsProcessor(sampling, prompt, None), 1.0
        for token, row in zip(s, rows.clone(), strict=True):
            processor.process(row)
            p *= float(distribution(row[None], [sampling])[0, token])
            processor.push([token])
        expected.append(n * p)
    often = [i for i, x in enumerate(expected) if x >= 5]
    seen = torch.tensor([float(counts[s]) for s in sequences])
    assert not seen[torch.tensor(expected) == 0].any()
    chi = sum((seen[i] - expected[i]) ** 2 / expected[i] for i in often)
    df = len(often)
    assert chi < df + 4 * (2 * df) ** 0.5 + 10
    stats = [c.speculated for c in done]
    assert 0 < sum(s.accepted for s in stats) < sum(s.verified for s in stats)


def test_cancelling_one_request_leaves_the_other_drafting(model, tokenizer, drafts):
    engine = Engine(model, tokenizer, draft=drafts["smaller"], draft_tokens=4)
    # with a seed, drafting does not depend on the clock
    a, b = (engine.submit(Request([i, 2], Sampling(max_tokens=60, seed=1))) for i in (1, 2))
    next(a)
    b.cancel()
    assert [d.finish_reason for d in b][-1] == "cancelled"
    want = Engine(model, tokenizer).run([Request([1, 2], Sampling(max_tokens=60))])[0]
    rest = a.completion()
    assert rest.ids == want.ids[-len(rest.ids) :]
    assert rest.speculated.drafted > 0
    assert engine.cache.pages.n_used == engine.draft.cache.pages.n_used == 0


def test_a_draft_model_reads_long_prompts_piece_by_piece(model, tokenizer, make_model):
    """While the draft model reads 400 tokens another request goes on. The tokens do not change."""
    draft = make_model(4, n_layers=1, dim=24)
    requests = [
        Request([5, 6, 7], Sampling(max_tokens=40, seed=0)),
        Request([8] * 400, Sampling(max_tokens=10, seed=0)),
    ]
    want = [outcomes(c) for c in Engine(model, tokenizer).run(requests)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("herd.engine.draft.CATCH_UP_TOKENS", 50)
        engine = Engine(model, tokenizer, draft=draft)
        talker, long = (engine.submit(r) for r in requests)
        next(long)
        before = len(talker._deltas)
        next(long)
        assert len(talker._deltas) >= before + 6
        assert [outcomes(talker.completion())] == want[:1]


def test_impossible_drafts_are_refused(model, tokenizer, make_model):
    with pytest.raises(EngineError, match="the draft model has 300 tokens and the model 259"):
        Engine(model, tokenizer, draft=make_model(vocab_size=300))
    with pytest.raises(EngineError, match="draft='n-gram'"):
        Engine(model, tokenizer, draft="n-gram")
    with pytest.raises(EngineError, match="draft_tokens=0 must be at least 1"):
        Engine(model, tokenizer, draft="ngram", draft_tokens=0)


def test_a_draft_with_a_shorter_context_proposes_nothing_beyond_it(model, tokenizer, make_model):
    """Beyond the draft's context, the model goes on alone."""
    request = Request([5] * 20, Sampling(max_tokens=80))
    want = outcomes(Engine(model, tokenizer).run([request])[0])
    draft = make_model(4, n_layers=1, dim=24, max_context=64)
    assert outcomes(Engine(model, tokenizer, draft=draft).run([request])[0]) == want
