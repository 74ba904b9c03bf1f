"""Bits per byte and fidelity against plain full logits in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.shards import Shards
from herd.data.sources import Document
from herd.errors import ConfigError, DataError
from herd.evals import bpb, windows
from herd.evals.bpb import compare_compression, compression
from herd.evals.fidelity import fidelity
from herd.evals.windows import HeldOut, from_shards, from_texts


@pytest.fixture
def documents(sentences, tokenizer):
    """The sentences, each so many times over, as held-out documents."""

    def make(repeat=1):
        langs = ("en", "de", "en", "fr", "ja")
        return from_texts(
            [Document(text * repeat, "", "prose", lang) for text, lang in zip(sentences, langs, strict=True)],
            tokenizer,
        )

    return make


@torch.inference_mode()
def log_probs(model, ids):
    return model.logits(torch.tensor([list(ids)])).double().log_softmax(-1)[0]


def nats(model, ids):
    logp = log_probs(model, ids[:-1])
    return -float(logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())


def test_bits_per_document(teacher, documents, sentences):
    docs = documents()
    got = compression(teacher, docs)
    assert got.bits == pytest.approx([nats(teacher, d.ids) / math.log(2) for d in docs], rel=1e-5)
    assert got.n_bytes.tolist() == [len(text.encode()) for text in sentences]
    assert got.n_tokens.tolist() == [len(d.ids) - 1 for d in docs]
    score = got.score()
    assert score.value == pytest.approx(got.bits.sum() / got.n_bytes.sum())
    assert set(score.detail["by_lang"]) == {"en", "de", "fr", "ja"}
    assert score.detail["by_lang"]["en"]["n"] == 2
    english = sum(got.bits[i] for i in (0, 2)) / sum(got.n_bytes[i] for i in (0, 2))
    assert score.detail["by_lang"]["en"]["value"] == pytest.approx(english)


def test_uniform_model_needs_log2_of_the_vocabulary(documents, make_model):
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    got = compression(model, documents())
    assert got.bits / got.n_tokens == pytest.approx(math.log2(560), rel=1e-6)


def test_long_documents_are_read_in_windows(teacher, documents):
    """Every token once: the first window from the start, later ones with a quarter of the context before them."""
    doc = documents(repeat=9)[0]
    ids, context = list(doc.ids), 40
    want, first = 0.0, 0
    while first < len(ids) - 1:
        start = 0 if first == 0 else first - 10
        stop = min(start + context, len(ids) - 1)
        logp = log_probs(teacher, ids[start:stop])
        want -= sum(float(logp[t - start, ids[t + 1]]) for t in range(first, stop))
        first = stop
    got = compression(teacher, [doc], context)
    assert got.n_tokens[0] == len(ids) - 1
    assert got.bits[0] == pytest.approx(want / math.log(2), rel=1e-5)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(8, 90))
def test_windows_score_every_token_once(lengths, context):
    docs = [HeldOut(torch.arange(n).tolist(), n) for n in lengths]
    seen = [[] for _ in docs]
    for batch in windows.windows(docs, context):
        assert batch.tokens_BT.shape[1] <= context
        for row, target, d in zip(batch.tokens_BT, batch.targets_BT, batch.document_B, strict=True):
            scored = target != -100
            assert torch.equal(row[scored] + 1, target[scored])
            seen[d] += target[scored].tolist()
    assert [sorted(s) for s in seen] == [list(range(1, n)) for n in lengths]


def test_batches_do_not_matter(teacher, student, monkeypatch, documents):
    docs = documents(repeat=3)
    want, near = compression(teacher, docs), fidelity(teacher, student, docs)
    monkeypatch.setattr(windows, "BATCH_TOKENS", 70)
    monkeypatch.setattr(bpb, "CHUNK_BYTES", 4 * 560 * 7)
    assert compression(teacher, docs).bits == pytest.approx(want.bits, rel=1e-5)
    assert fidelity(teacher, student, docs).kl == pytest.approx(near.kl, rel=1e-4)


def test_compare_is_paired(teacher, student, documents):
    a, b = (compression(m, documents()) for m in (teacher, student))
    score = compare_compression("teacher_vs_student", a, b)
    assert score.value == pytest.approx(a.score().value - b.score().value)
    assert (compare_compression("same", a, a).value, compare_compression("same", a, a).hi) == (0, 0)
    with pytest.raises(DataError, match="same held-out"):
        compare_compression("x", a, compression(teacher, documents()[:2]))


def test_fidelity_by_definition(teacher, student, documents):
    docs = documents()
    got = fidelity(teacher, student, docs)
    kls = []
    for d, doc in enumerate(docs):
        log_p, log_q = (log_probs(m, doc.ids[:-1]) for m in (teacher, student))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        tv = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
        kls += kl.tolist()
        assert got.kl[d] == pytest.approx(float(kl.sum()), rel=1e-4)
        assert got.overlap[d] == pytest.approx(float((1 - tv).sum()), rel=1e-4)
        assert got.agree[d] == float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    kl, top1, overlap = got.scores()
    assert (kl.name, top1.name, overlap.name) == ("kl", "top1", "overlap")
    assert kl.value == pytest.approx(np.mean(kls), rel=1e-4)
    assert kl.detail["p99"] == pytest.approx(np.quantile(kls, 0.99), rel=1e-3)
    assert kl.lo <= kl.value <= kl.hi


def test_a_model_is_itself(teacher, documents):
    kl, top1, overlap = fidelity(teacher, teacher, documents()).scores()
    assert kl.value == pytest.approx(0, abs=1e-6)
    assert top1.value == 1
    assert overlap.value == pytest.approx(1, abs=1e-5)


def test_other_vocabulary_is_refused(teacher, documents, make_model):
    with pytest.raises(ConfigError, match="vocab_size=560, student 600"):
        fidelity(teacher, make_model(0, vocab_size=600), documents())


def test_nothing_held_out(teacher, tokenizer):
    with pytest.raises(DataError, match="no held-out text to measure"):
        from_texts(["", ""], tokenizer)
    with pytest.raises(DataError, match="no held-out document"):
        compression(teacher, [HeldOut([5], 0)])
    with pytest.raises(DataError, match="no held-out document"):
        fidelity(teacher, teacher, [HeldOut([5], 0)])


def test_shards_hold_the_same_documents(tmp_path, tokenizer, sentences):
    texts = [Document(t, source=str(i), kind="prose", lang="en") for i, t in enumerate(sentences)]
    shards = Shards.write(tmp_path / "heldout", texts, tokenizer)
    want = {tuple(d.ids): d.n_bytes for d in from_texts(sentences, tokenizer)}
    got = from_shards(shards, tokenizer)
    assert {tuple(map(int, d.ids)): d.n_bytes for d in got} == want
    assert {(d.kind, d.lang) for d in got} == {("prose", "en")}
    for cut in from_shards(shards, tokenizer, excerpt=7):
        assert len(cut.ids) == 8
        assert cut.n_bytes == len(tokenizer.decode_bytes(cut.ids[1:].tolist()))
    assert from_texts(sentences, tokenizer, max_bytes=1)[0].n_bytes == len(sentences[0].encode())
