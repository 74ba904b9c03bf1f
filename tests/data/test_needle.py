"""Needles have the exact length, the fact where it should be, and an answer that only the text gives."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.data.needle import STYLES, WORDS, NeedleMaker, RetrievalStream, draw_codes, draw_names, name_list
from herd.data.shuffle import generator
from herd.errors import DataError


@pytest.fixture(scope="module")
def maker(shards, byte_tokenizer):
    return NeedleMaker(byte_tokenizer, shards)


@given(
    length=st.integers(700, 3000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    style=st.integers(0, len(STYLES) - 1),
    n_facts=st.integers(1, 6),
    split=st.sampled_from(["train", "test"]),
)
@settings(max_examples=60, deadline=None)
def test_a_needle_has_its_length_and_its_fact_at_its_depth(
    maker, byte_tokenizer, length, depth, seed, style, n_facts, split
):
    needle = maker.make(length, depth, seed, split=split, n_facts=n_facts, style=style)
    assert needle.ids_N.shape == (length,)
    assert needle.ids_N[0] == byte_tokenizer.bos_id
    assert (needle.ids_N[1:] < 256).all()
    text, prompt = byte_tokenizer.decode(needle.ids_N), byte_tokenizer.decode(needle.prompt)
    question = needle.questions[-1]
    assert byte_tokenizer.decode(needle.answer_ids) == " " + needle.answer
    assert text == prompt + " " + needle.answer
    # The code stands in the prompt exactly once, in the asked name's fact, on a line of its own.
    fact = STYLES[style][0].format(name=question.name, code=" " + question.code)
    assert prompt.count(question.code) == 1
    assert f"\n{fact}" in prompt
    head = STYLES[style][1].format(name=question.name)
    assert prompt.endswith("\n" + head)
    # Where it stands.
    body = len(prompt) - len(head)
    assert abs(prompt.index(fact) / body - depth) < 0.05 + 60 * (n_facts + 1) / body
    again = maker.make(length, depth, seed, split=split, n_facts=n_facts, style=style)
    assert np.array_equal(again.ids_N, needle.ids_N)


def test_train_and_test_are_disjoint(byte_tokenizer):
    assert not {w for words in WORDS["train"] for w in words} & {w for words in WORDS["test"] for w in words}
    codes = {s: set(draw_codes(generator(0), s, 1500)) for s in WORDS}
    assert not codes["train"] & codes["test"]
    names = {s: name_list(byte_tokenizer, s) for s in WORDS}
    assert len(set(draw_names(generator(1), names["test"], 100))) == 100
    for words in WORDS.values():
        assert all(len(set(of)) == len(of) for of in words)


def test_a_question_gives_the_facts_words_before_its_code():
    for fact, question in STYLES:
        before = fact.partition("{code}")[0]
        assert question.endswith(before.splitlines()[-1][-len("{name}:") :])
        assert "{name}" in question


def test_other_seeds_give_other_needles(maker):
    needles = [maker.make(900, 0.5, seed) for seed in range(20)]
    assert len({needle.answer for needle in needles}) > 15
    assert len({needle.ids_N.tobytes() for needle in needles}) == 20
    test = maker.make(900, 0.5, 0, split="test")
    assert test.answer != needles[0].answer


@pytest.mark.parametrize(
    "arguments, match", [((20, 0.5, 0), "20 tokens are too few for 4 facts"), ((900, 1.5, 0), "depth 1.5")]
)
def test_impossible_requests_are_refused(maker, arguments, match):
    with pytest.raises(DataError, match=match):
        maker.make(*arguments)
    with pytest.raises(DataError, match="split 'both'"):
        maker.make(900, 0.5, 0, split="both")
    with pytest.raises(DataError, match="2 questions about 1 facts"):
        maker.make(900, 0.5, 0, n_facts=1, n_questions=2)


def test_the_shortest_length_that_the_error_names_is_enough(maker):
    with pytest.raises(DataError, match="at least") as error:
        maker.make(100, 0.5, 3)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(maker.make(least + 40, 0.5, 3).ids_N) == least + 40


def test_the_retrieval_stream_is_a_pure_function_of_the_position(maker):
    stream = RetrievalStream(maker, 1200, seed=5)
    whole = stream.batch(7, 6)
    parts = [stream.batch(7, 1), stream.batch(8, 3), stream.batch(11, 2)]
    assert torch.equal(whole.tokens_BT, torch.cat([p.tokens_BT for p in parts]))
    assert torch.equal(whole.targets_BT, torch.cat([p.targets_BT for p in parts]))
    trained_BT = whole.targets_BT[:, :-1] >= 0
    assert torch.equal(whole.tokens_BT[:, 1:][trained_BT], whole.targets_BT[:, :-1][trained_BT])
    for row, position in enumerate(range(7, 13)):  # only the answers are trained, and all facts are asked
        questions = stream.needle(position).questions
        assert len(questions) == stream.n_facts
        n_trained = sum(q.stop - q.start for q in questions) + len(questions) - 1  # with line breaks between
        assert int((whole.targets_BT[row] >= 0).sum()) == n_trained
    with pytest.raises(DataError, match="are too few for"):
        RetrievalStream(maker, 64, seed=0)


def test_names_are_words_of_one_token_if_there_are_enough():
    class Words:
        n_ordinary = 400
        start_ids = ()

        def token_bytes(self, id: int) -> bytes:
            return b" w" + "".join(chr(97 + (id // 26**k) % 26) for k in range(3)).encode()

    split = {s: name_list(Words(), s) for s in WORDS}
    assert not set(split["train"]) & set(split["test"])
    assert len(split["train"]) + len(split["test"]) == 400
    assert all(" " not in name for names in split.values() for name in names)


def test_filler_may_be_an_array_or_a_function(byte_tokenizer):
    def needle(filler, depth):
        return NeedleMaker(byte_tokenizer, filler).make(600, depth, 1, split="test", n_facts=2)

    assert len(needle(np.arange(97, 123), 0.0).ids_N) == 600
    constant = needle(lambda random, n: np.full(n, 120), 1.0)
    assert (constant.ids_N == 120).sum() > 200
    with pytest.raises(DataError, match="almost no ordinary text"):
        needle(np.array([byte_tokenizer.bos_id]), 0.0)


def test_the_answer_has_the_same_tokens_alone_and_in_place():
    from herd.text.tokenizer import Tokenizer

    texts = ["The secret code for amber falcon is 4821.\n" * 20, "# code(x) = 1234\n>>> Look up.\n" * 20]
    tokenizer = Tokenizer.train(texts, vocab_size=540)
    maker = NeedleMaker(tokenizer, tokenizer.encode("Some filler text.\nMore of it.\n" * 50))
    for style in range(len(STYLES)):
        needle = maker.make(500, 0.5, style, style=style)
        tail = tokenizer.encode(STYLES[style][1].format(name=needle.questions[0].name) + " " + needle.answer)
        assert needle.ids_N[-len(tail) :].tolist() == tail
