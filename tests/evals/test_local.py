"""A checkpoint that answers tasks: its tokens are cut as lm-eval cuts them, and a context too short is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.evals.harness import run_task
from herd.evals.local import CheckpointModel
from herd.evals.tasks import Data, Generate, Rank, Read, make_task


@pytest.fixture(scope="module")
def local(make_model, tokenizer):
    model = make_model(3, max_context=2048)
    return CheckpointModel(model, tokenizer, name="small", hash="ab" * 32, max_batch=4)


@given(
    st.lists(
        st.sampled_from(["a", "!", "\n", "\n\n", " ", "\t", "Brown fox", "7", "\r\n", "é", "'s", "。"])
    ).map("".join)
)
def test_encoding_by_paragraphs_gives_the_ids_of_the_whole_text(local, tokenizer, text):
    assert local.encode(text) == tokenizer.encode(text)


def test_pairs_are_cut_as_lm_eval_does(local, tokenizer):
    pair = local.pair("The quick ", "brown")
    whole = tokenizer.encode("The quick brown", bos=True)
    assert [*pair.context, *pair.continuation] == whole
    assert pair.context == tokenizer.encode("The quick", bos=True)
    assert local.pair("", "brown").context == [tokenizer.bos_id]


def test_a_checkpoint_answers_all_three_kinds(local):
    asked = [
        Generate("The dog", max_tokens=4),
        Rank((("The dog", " sleeps"), ("The dog", " jumps on"))),
        Read("The lazy dog."),
        Generate(({"role": "user", "content": "Hello"},), max_tokens=3),
    ]
    answers = dict(local.answer(asked))
    assert sorted(answers) == [0, 1, 2, 3]
    assert answers[0].finish_reason in ("stop", "length")
    assert all(x.nats < 0 and x.n_tokens > 0 for x in answers[1].likelihoods)
    [text] = answers[2].likelihoods
    [parts] = dict(local.answer([Rank((("", "The lazy dog."),))]))[0].likelihoods
    assert text.nats == pytest.approx(parts.nats, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "shots", "cure"), [("boolq", 0, ""), ("gsm8k", 8, " or fewer than 8 shots"), ("gsm8k", 0, "")]
)
def test_a_context_too_short_names_the_cure(make_model, tokenizer, tmp_path, name, shots, cure):
    model = CheckpointModel(make_model(3), tokenizer, name="short", hash="cd" * 32)
    row = run_task(model, make_task(name, shots=shots), Data(), tmp_path)
    assert row.status == "failed"
    assert row.reason.endswith("the context has 64: use a model with a longer context" + cure)
