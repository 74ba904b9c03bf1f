"""Penalties and biases: against transformers and the definitions, and bad values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.engine import Sampling
from herd.engine.rules import Rules
from herd.errors import EngineError

V = 12
LOGITS = torch.linspace(3, -3, V)[torch.randperm(V, generator=torch.Generator().manual_seed(1))]


def bent(sampling: Sampling, prompt: list[int], answer: list[int]) -> torch.Tensor:
    rules = Rules(sampling, prompt, None)
    rules.push(answer)
    logits = LOGITS.clone()
    rules.apply(logits)
    return logits


def test_repetition_penalty_is_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    prompt, answer = [1, 2, 2, 5], [7, 7, 0]
    want = processors.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), LOGITS.clone()[None])[0]
    assert torch.allclose(bent(Sampling(repetition_penalty=1.7), prompt, answer), want)


def test_presence_and_frequency_count_the_answer_only():
    got = bent(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 1], [4, 4, 4, 6])
    want = LOGITS.clone()
    want[4] -= 0.5 + 3 * 0.25
    want[6] -= 0.5 + 0.25
    assert torch.allclose(got, want)


def test_bias_is_added_after_penalties():
    got = bent(Sampling(repetition_penalty=2.0, logit_bias={3: 1.5, 0: -100}), [3], [])
    want = LOGITS.clone()
    want[3] = (want[3] / 2 if want[3] > 0 else want[3] * 2) + 1.5
    want[0] -= 100
    assert torch.allclose(got, want)


TOKENS = st.lists(st.integers(0, V - 1), max_size=8)


@given(TOKENS, TOKENS, TOKENS, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_tokens_taken_back_leave_no_trace(prompt, answer, guessed, repetition, presence, frequency):
    s = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    rules, logits = Rules(s, prompt, None), LOGITS.clone()
    rules.push(answer)
    rules.push(guessed)
    rules.pop(guessed)
    rules.apply(logits)
    assert torch.allclose(logits, bent(s, prompt, answer))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
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
def test_impossible_settings(fields, message):
    with pytest.raises(EngineError, match=message):
        Sampling(**fields)
