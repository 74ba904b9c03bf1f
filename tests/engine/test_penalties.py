"""Penalties and biases, compared with transformers and the definitions. Bad values are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.engine import Engine, Request, Sampling
from herd.engine.logits import LogitsProcessor
from herd.errors import EngineError

V = 12
LOGITS = torch.linspace(3, -3, V)[torch.randperm(V, generator=torch.Generator().manual_seed(1))]


def bent(sampling: Sampling, prompt: list[int], answer: list[int]) -> torch.Tensor:
    processor = LogitsProcessor(sampling, prompt, None)
    processor.push(answer)
    logits = LOGITS.clone()
    processor.process(logits)
    return logits


def test_the_repetition_penalty_is_that_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    prompt, answer = [1, 2, 2, 5], [7, 7, 0]
    want = processors.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([prompt + answer]), LOGITS.clone()[None]
    )[0]
    assert torch.allclose(bent(Sampling(repetition_penalty=1.7), prompt, answer), want)


def test_presence_and_frequency_count_the_answer_only():
    got = bent(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 1], [4, 4, 4, 6])
    want = LOGITS.clone()
    want[4] -= 0.5 + 3 * 0.25
    want[6] -= 0.5 + 0.25
    assert torch.allclose(got, want)


def test_the_bias_is_added_after_penalties():
    got = bent(Sampling(repetition_penalty=2.0, logit_bias={3: 1.5, 0: -100}), [3], [])
    want = LOGITS.clone()
    want[3] = (want[3] / 2 if want[3] > 0 else want[3] * 2) + 1.5
    want[0] -= 100
    assert torch.allclose(got, want)


TOKENS = st.lists(st.integers(0, V - 1), max_size=8)


@given(TOKENS, TOKENS, TOKENS, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_popped_tokens_leave_no_trace_in_the_penalties(
    prompt, answer, drafted, repetition, presence, frequency
):
    s = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    processor, logits = LogitsProcessor(s, prompt, None), LOGITS.clone()
    processor.push(answer)
    processor.push(drafted)
    processor.pop(drafted)
    processor.process(logits)
    assert torch.allclose(logits, bent(s, prompt, answer))


def test_penalties_do_not_depend_on_the_batch(model, tokenizer):
    """Each sequence has its own penalties, and each penalty changes something."""
    kinds = [
        {},
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {66: 100}},
        {"logit_bias": {66: -100}, "temperature": 0.9, "seed": 3, "logprobs": 1},
    ]
    requests = [Request([1, 2, 3] * 4, Sampling(max_tokens=150, **kind)) for kind in kinds]
    together = Engine(model, tokenizer).run(requests)
    alone = [Engine(model, tokenizer).run([request])[0] for request in requests]
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert together[4].ids == [66] * 150
    assert 66 not in together[5].ids
    assert all(c.ids != together[0].ids for c in together[1:])


def test_logprobs_are_those_before_penalties_and_biases(model, tokenizer):
    sampling = Sampling(max_tokens=5, logit_bias={66: 100}, logprobs=0)
    got = Engine(model, tokenizer).run([Request([1], sampling)])[0]
    with torch.inference_mode():
        logp = model.logits(torch.tensor([[1, *got.ids]]))[0, :-1].double().log_softmax(-1)
    assert [p.logprob for p in got.logprobs] == pytest.approx(
        [float(logp[i, 66]) for i in range(5)], abs=1e-4
    )


def test_a_bias_outside_the_vocabulary_is_refused(model, tokenizer):
    with pytest.raises(EngineError, match="logit_bias: token 259 is outside the model's vocabulary of 259"):
        Engine(model, tokenizer).submit(Request([1], Sampling(logit_bias={259: 1})))


def test_several_answers_share_one_prompt_and_follow_from_its_seed(model, tokenizer):
    """The first answer has the request's seed, the others distinct ones. The prompt is computed once."""
    request = Request(list(range(130)), Sampling(max_tokens=12, temperature=1.0, seed=5))
    engine = Engine(model, tokenizer)
    streams = engine.submit_many(request, 4)
    answers = [stream.completion() for stream in streams]
    assert answers[0].ids == Engine(model, tokenizer).run([request])[0].ids
    assert len({tuple(a.ids) for a in answers}) == 4
    assert [a.shared_tokens for a in answers] == [0, 128, 128, 128]
    again = [s.completion().ids for s in Engine(model, tokenizer, max_batch=1).submit_many(request, 4)]
    assert again == [a.ids for a in answers]
    unseeded = Request([1], Sampling(max_tokens=12, temperature=1.0))
    assert len({tuple(s.completion().ids) for s in engine.submit_many(unseeded, 3)}) == 3
    with pytest.raises(EngineError, match="n=0 must be at least 1"):
        engine.submit_many(request, 0)
