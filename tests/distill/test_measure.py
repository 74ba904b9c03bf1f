"""Measures of a student against float64 computed document by document."""

from __future__ import annotations

import math

import pytest
import torch
from test_vocab import make_cut

from herd.data.batch import Batch
from herd.distill.measure import Quality, StudentEvaluator, difference
from herd.distill.vocab import fold, trim_model
from herd.distill.whole_rows import read_whole
from herd.errors import DataError
from herd.evals.windows import HeldOut
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM

CONFIG = ModelConfig(vocab_size=576, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_context=64)
CUT = make_cut()
TEXTS = ("It was the best of times", "naïve café: the worst, it was the worst\n\tdef f(x)", "was")
DOCUMENTS = [
    HeldOut([CUT.tokenizer.bos_id, *CUT.tokenizer.encode(text)], len(text.encode())) for text in TEXTS
]


def model(seed: int) -> LlamaLM:
    return LlamaLM(CONFIG).init_weights(seed, std=0.3).requires_grad_(False)


@pytest.mark.parametrize("cut", [None, CUT])
def test_the_measures_are_those_of_float64(cut, tmp_path):
    teacher, student = model(0), model(1)
    student = student if cut is None else trim_model(student, cut)
    found = StudentEvaluator(teacher, DOCUMENTS, cut, 64, torch.float32, tmp_path).measure(student)
    wide = [m.double() for m in (teacher, student)]
    for n, document in enumerate(DOCUMENTS):
        ids = torch.tensor(document.ids)
        if cut is None:
            p = wide[0].lm_head(wide[0](ids[None, :-1]))[0].softmax(-1)
        else:
            read = read_whole(Batch(ids[None, :-1], ids[None, :-1]), cut)
            p = wide[0].lm_head(wide[0](read.batch.tokens_BT))[0, read.source_BT[0]].softmax(-1)
            p = fold(p, cut, [read.begun.get((0, t), ()) for t in range(len(ids) - 1)])
        q = wide[1].lm_head(wide[1](ids[None, :-1]))[0].softmax(-1)
        target = ids[1:]
        nats = -q.gather(1, target[:, None]).log().sum()
        assert found.bits[n] == pytest.approx(float(nats) / math.log(2), rel=1e-4)
        assert found.kl[n] == pytest.approx(float((torch.xlogy(p, p) - p * q.log()).sum()), rel=2e-3)
        assert found.hits[n] == (q.argmax(-1) == target).sum()
        assert found.teacher_hits[n] == (p.argmax(-1) == target).sum()
        assert found.agree[n] == (p.argmax(-1) == q.argmax(-1)).sum()
        assert found.n_tokens[n] == len(target)


def test_the_teacher_itself_has_no_divergence(tmp_path):
    found = StudentEvaluator(model(0), DOCUMENTS, None, 64, torch.float32, tmp_path).measure(None)
    assert found.kl == [0, 0, 0]
    assert found.agree == found.n_tokens
    assert found.hits == found.teacher_hits
    assert found.summary()["accuracy_kept"]["value"] in (0.0, 1.0)


def test_a_difference_is_paired_and_has_the_sign_of_the_worse():
    one = Quality([8.0, 16.0, 4.0], [2.0, 4.0, 1.0], [1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3, [1.0] * 3)
    more = Quality(
        [9.0, 18.0, 4.5],
        *[getattr(one, name) for name in ("n_bytes", "n_tokens", "kl", "agree", "hits", "teacher_hits")],
    )
    found = difference(more, one)
    assert found["value"] == pytest.approx(3.5 / 7)
    assert found["lo"] == pytest.approx(0.5)
    with pytest.raises(DataError, match="same held-out"):
        difference(one, Quality([1.0], [1.0], [1.0], [0.0], [0.0], [1.0], [1.0]))
