"""An answer does not depend on anything else in the engine: other requests, preemption, draft tokens.

Requests of mixed lengths share so few pages that the latest are preempted again and again, in the model's
cache and in the draft's, and each must give the tokens that it gives alone. The models are as narrow as can
be, so that a wrong page or a stale draft token changes what follows.
"""

import random

import pytest

from herd.engine import Engine, Request, Sampling
from herd.quant import scheme
from herd.quant.linear import swap_linears


@pytest.fixture(scope="module")
def small(make_model):
    """Quantized models: the one that answers, and a draft for it."""

    def build(seed: int, **changes):
        model = make_model(seed, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96, **changes)
        return swap_linears(model, scheme("q8"))

    return {"model": build(7), "draft": build(4, n_layers=1)}


def requests(rng: random.Random, n: int) -> list[Request]:
    """Return greedy and sampled requests. Some begin alike, and some exceed the pages alone."""
    start = [rng.randrange(256) for _ in range(70)]
    out = []
    for i in range(n):
        prompt = start * rng.choice([0, 0, 1]) + [rng.randrange(256) for _ in range(rng.choice([1, 20, 50]))]
        sampling = Sampling(
            max_tokens=rng.choice([60, 150]),
            temperature=rng.choice([0, 0.8, 1.3]),
            top_k=rng.choice([0, 9]),
            frequency_penalty=rng.choice([0, 0.5]),
            seed=i,
        )
        out.append(Request(prompt, sampling))
    return out


def check(small, kv: str, draft: str | None, trial: int) -> int:
    """Compare answers alone and in a batch. Return how often a request was preempted."""
    rng = random.Random(trial)
    some = requests(rng, 5)

    def engine(**how) -> Engine:
        return Engine(small["model"], None, kv=kv, draft=small.get(draft, draft), draft_tokens=3, **how)

    alone = [engine().run([request])[0].ids for request in some]
    crowd = engine(max_batch=rng.choice([3, 32]))
    crowd.cache.pages.limit = rng.choice([3, 4, 5])
    if draft == "draft":
        crowd.draft.cache.pages.limit = rng.choice([3, 5, 8])
    assert [c.ids for c in crowd.run(some)] == alone
    assert crowd.cache.pages.n_used == 0
    return crowd.n_preempted


@pytest.mark.parametrize(
    ("kv", "draft"), [("fp32", None), ("bf16", "ngram"), ("int8", None), ("int8", "draft")]
)
def test_answers_do_not_depend_on_the_batch(small, kv, draft):
    assert sum(check(small, kv, draft, trial) for trial in range(2)) > 0


@pytest.mark.soak
@pytest.mark.parametrize("draft", [None, "ngram", "draft"])
@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_answers_do_not_depend_on_the_batch_over_many_random_cases(small, kv, draft):
    assert sum(check(small, kv, draft, trial) for trial in range(2, 40)) > 50
