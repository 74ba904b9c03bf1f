"""Scores with shared beginnings are those of one plain forward per pair, whatever is shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine import score
from herd.engine.score import Pair, Scorer
from herd.errors import EngineError

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=6)  # few tokens: beginnings are often alike


def plain(model, pair):
    """Score a pair by one forward over the whole sequence."""
    ids = [*pair.context, *pair.continuation]
    with torch.inference_mode():
        logp = model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[len(pair.context) - 1 :]
    picked = logp[range(len(pair.continuation)), list(pair.continuation)]
    return picked.sum().item(), bool((logp.argmax(-1) == torch.tensor(pair.continuation)).all())


def same(model, items, found):
    assert sorted(number for number, _ in found) == list(range(len(items)))
    for number, scored in found:
        for pair, (nats, greedy) in zip(items[number], scored, strict=True):
            expected, likeliest = plain(model, pair)
            assert nats == pytest.approx(expected, abs=1e-4)
            assert greedy == likeliest


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4), min_size=1, max_size=6), st.integers(0, 8)
)
def test_scores_equal_those_of_plain_forwards(model, items, slack):
    items = [[Pair(*pair) for pair in item] for item in items]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "SLACK_TOKENS", slack)
        patch.setattr(score, "PREFILL_TOKENS", 300)
        same(model, items, list(Scorer(model).score(items)))


def test_shared_shots_and_questions_do_not_change_a_score(models):
    """There are two sets of shots, several questions after each, and choices of one and of many tokens."""
    g = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(0, 259, (n,), generator=g).tolist()  # noqa: E731
    heads = [ids(90), ids(70)]
    items = []
    for head in heads:
        for _ in range(5):
            question = head + ids(9)
            items.append([Pair(question, ids(n)) for n in (1, 1, 5, 12)])
    for model in models.values():
        scorer = Scorer(model)
        same(model, items, [*scorer.score(items)])
        same(model, items[3:5], [*scorer.score(items[3:5])])  # again, behind what is kept


def test_shared_beginnings_are_computed_once(model, monkeypatch):
    seen = []
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model),
        "forward",
        lambda self, tokens, *rest: seen.append(tokens.numel()) or forward(self, tokens, *rest),
    )
    head = list(range(200))
    items = [[Pair([*head, i, i + 1], [choice, 7]) for choice in range(4)] for i in range(20)]
    list(Scorer(model).score(items))
    # the head, then two tokens of a question and one of each choice (the last token is only predicted)
    assert sum(seen) == 200 + 20 * (2 + 4)


def test_pairs_that_cannot_be_scored_are_refused(model):
    scorer = Scorer(model)
    with pytest.raises(
        EngineError, match="513 tokens, the context has 512: use a model with a longer context"
    ):
        scorer.check([[Pair([1] * 512, [1, 2])]])
    scorer.check([[Pair([1] * 512, [1])]])
    with pytest.raises(EngineError, match="at least one token"):
        scorer.check([[Pair([], [1])]])
    with pytest.raises(EngineError, match="token 259 is outside"):
        scorer.check([[Pair([1], [259])]])
