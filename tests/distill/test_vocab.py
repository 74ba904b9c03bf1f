"""Models with a trimmed vocabulary, and the teacher's predictions in that vocabulary."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.batch import Batch
from herd.distill.vocab import VocabCut, cut_vocabulary, fold, trim_model
from herd.distill.whole_rows import read_whole
from herd.errors import ConfigError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Tokenizer

TEXT = (
    "It was the best of times, it was the worst of times; 1234 naïve café 日本語 🦙\n\n\tdef f(x): return x\r\n"
    * 40
)
WHOLE = Tokenizer.train([TEXT], 570)
CONFIG = ModelConfig(
    vocab_size=576, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, tie_embeddings=True
)


def make_cut(size: int = 530) -> VocabCut:
    return cut_vocabulary(WHOLE, size, 576)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_do_not_change(tied):
    cut = make_cut()
    teacher = LlamaLM(CONFIG.replace(tie_embeddings=tied)).init_weights(0, std=0.3)
    student = trim_model(teacher, cut)
    tokens = torch.randint(0, 530, (2, 9))
    torch.testing.assert_close(student.logits(tokens), teacher.logits(cut.kept_W[tokens])[..., cut.kept_W])
    assert student.config.n_params == teacher.config.n_params - 46 * 16 * (1 if tied else 2)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_folding_adds_every_dropped_token_to_its_first_piece_in_float64():
    cut = make_cut()
    p = torch.softmax(torch.randn(7, 576, dtype=torch.float64), -1)
    expected = torch.zeros(7, 530, dtype=torch.float64)
    for old in range(576):
        expected[:, cut.pieces[old][0]] += p[:, old]
    torch.testing.assert_close(fold(p, cut), expected)
    torch.testing.assert_close(fold(p, cut).sum(-1), torch.ones(7, dtype=torch.float64))


def test_inside_a_token_only_those_that_begin_with_its_pieces_are_possible():
    cut = make_cut(516)  # four merges are left
    p = torch.softmax(torch.randn(576, dtype=torch.float64), -1)
    assert max(map(len, cut.pieces)) >= 5
    for pieces in cut.pieces:
        for n in range(1, len(pieces)):
            begun = tuple(pieces[:n])
            expected = torch.zeros(516, dtype=torch.float64)
            for old, others in enumerate(cut.pieces):
                if len(others) > n and tuple(others[:n]) == begun:
                    expected[others[n]] += p[old]
            found = fold(torch.stack((p, p)), cut, [(), begun])
            torch.testing.assert_close(found[1], expected / expected.sum())
            torch.testing.assert_close(found[:1], fold(p[None], cut))


def row(cut: VocabCut, *texts: str) -> Batch:
    """Return one packed row of documents in the trimmed vocabulary."""
    documents = [[cut.tokenizer.bos_id, *cut.tokenizer.encode(text)] for text in texts]
    ids = torch.tensor([list(chain(*documents))])
    owners = torch.tensor([[n for n, document in enumerate(documents) for _ in document]])
    positions = torch.tensor([[n for document in documents for n in range(len(document))]])
    return Batch(ids, ids, positions, owners)


@given(
    st.lists(
        st.text(max_size=40) | st.sampled_from([TEXT[:90], "the worst", "timesthe"]), min_size=1, max_size=3
    )
)
def test_the_teacher_reads_the_tokens_that_it_has_for_the_text(texts):
    cut = make_cut()
    batch = row(cut, *texts)
    whole = read_whole(batch, cut)
    expected = [[WHOLE.bos_id, *WHOLE.encode(text)] for text in texts]
    n = sum(map(len, expected))
    assert whole.batch.tokens_BT[0, :n].tolist() == list(chain(*expected))
    assert whole.batch.positions_BT[0, :n].tolist() == [n for ids in expected for n in range(len(ids))]
    assert whole.batch.documents_BT[0, :n].tolist() == [n for n, ids in enumerate(expected) for _ in ids]
    small, read = (
        [tokenizer.token_bytes(id_) for id_ in ids]
        for tokenizer, ids in (
            (cut.tokenizer, batch.tokens_BT[0].tolist()),
            (WHOLE, whole.batch.tokens_BT[0, :n].tolist()),
        )
    )
    for t, source in enumerate(whole.source_BT[0].tolist()):
        begun = b"".join(map(cut.tokenizer.token_bytes, whole.begun.get((0, t), ())))
        assert b"".join(read[: source + 1]) + begun == b"".join(small[: t + 1])
        if begun:
            following = batch.tokens_BT[0, t + 1]
            token = whole.batch.tokens_BT[0, source + 1]
            possible, pieces = cut.continuations[whole.begun[0, t]]
            assert following in pieces[possible == token]


def test_a_row_that_is_cut_within_a_character_is_read_as_it_is():
    cut = make_cut()
    ids = torch.tensor([[cut.tokenizer.bos_id, *cut.tokenizer.encode("it was the 🦙")][:-1]])
    whole = read_whole(Batch(ids, ids), cut)
    assert whole.batch.tokens_BT.tolist() == cut.kept_W[ids].tolist()
    assert whole.begun == {}
    assert whole.source_BT[0].tolist() == list(range(ids.shape[1]))


def test_a_text_that_is_split_otherwise_is_read_as_it_is_there():
    """With the commonest tokens kept, a shorter merge may come where a longer one was dropped."""
    counts = dict.fromkeys(WHOLE.encode("times") + WHOLE.encode("esth"), 9)
    cut = cut_vocabulary(WHOLE, 530, 576, counts)
    batch = row(cut, TEXT[:200])
    whole = read_whole(batch, cut)
    n = int((whole.batch.documents_BT[0] == 0).sum())
    assert WHOLE.decode(whole.batch.tokens_BT[0, 1:n].tolist()) == TEXT[:200]


def test_a_cut_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="trimmed for a model of 576"):
        trim_model(LlamaLM(CONFIG.replace(vocab_size=49)), make_cut())
