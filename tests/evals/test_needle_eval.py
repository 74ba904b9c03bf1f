"""The needle test with models that know, and that do not know, the answer."""

import numpy as np
import pytest

from herd.data.needle import NeedleMaker
from herd.engine import Completion, Engine
from herd.errors import DataError
from herd.evals.needle import needle


@pytest.fixture
def filler(tokenizer, sentences):
    return np.array(tokenizer.encode("\n".join(sentences * 4)))


@pytest.fixture
def knowing(monkeypatch, tokenizer, filler):
    """Replaces decoding by answers that a reader of the prompt knows, except beyond a given length."""

    def install(longest: int, suffix: str = "\n"):
        seen = []

        def run(self, requests):
            out = []
            for request in requests:
                seen.append(request)
                text = tokenizer.decode(request.prompt_ids, skip_special=True)
                last = text.rpartition("\n")[2]
                asked = next(last[k:] for k in range(len(last)) if text.count(last[k:]) > 1)
                after = text[text.index(asked) + len(asked) :]
                right = after[:5] + suffix if len(request.prompt_ids) <= longest else " 1234"
                out.append(Completion([], right, "length"))
            return out

        monkeypatch.setattr(Engine, "run", run)
        return seen

    return install


def test_right_answers_count(make_model, tokenizer, filler, knowing):
    model = make_model(0, max_context=512)
    seen = knowing(400)
    score = needle(model, tokenizer, filler, [384, 512], n=10)
    assert {k: v["value"] for k, v in score.detail["by_length"].items()} == {"384": 1.0, "512": 0.0}
    assert (score.name, score.value, score.n) == ("needle", 0.5, 20)
    assert len(score.detail["grid"]) == 10
    assert {g["value"] for g in score.detail["grid"] if g["length"] == 384} == {1.0}
    assert score.detail["by_depth"]["0.5"]["n"] == 4
    assert {len(r.prompt_ids) + r.sampling.max_tokens - 1 for r in seen} == {384, 512}


def test_a_longer_number_is_wrong(make_model, tokenizer, filler, knowing):
    knowing(10**6, suffix="7")
    assert needle(make_model(0, max_context=512), tokenizer, filler, [400], n=4).value == 0


def test_random_weights_find_nothing(make_model, tokenizer, filler):
    score = needle(make_model(0, max_context=512), tokenizer, filler, [300, 400], n=5)
    assert score.value == 0
    assert score.hi < 0.35


def test_questions_are_not_those_of_training(tokenizer, filler):
    maker = NeedleMaker(tokenizer, filler)
    test, train = (
        {maker.make(400, 0.5, s, split=split).answer for s in range(40)} for split in ("test", "train")
    )
    assert not test & train


def test_beyond_the_context(make_model, tokenizer, filler):
    with pytest.raises(DataError, match=r"\[300\] are beyond the model's context of 256"):
        needle(make_model(0, max_context=256), tokenizer, filler, [200, 300])
    with pytest.raises(DataError, match="nothing to ask"):
        needle(make_model(0, max_context=256), tokenizer, filler, [])
