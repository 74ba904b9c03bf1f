"""Streams are pure functions of the position: any split into batches or ranks gives the same rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.data.batch import IGNORE
from herd.data.packing import DialogStream, pack_rows
from herd.data.shards import Shards
from herd.data.shuffle import mixed_key, permute
from herd.data.stream import MixStream, TokenStream
from herd.data.text_files import DataWarning
from herd.errors import DataError


def same(a, b):
    for name in ("tokens_BT", "targets_BT", "positions_BT", "documents_BT"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name


def joined(batches):
    names = ("tokens_BT", "targets_BT", "positions_BT", "documents_BT")
    parts = {n: [getattr(b, n) for b in batches] for n in names}
    return type(batches[0])(*(None if p[0] is None else torch.cat(p) for p in parts.values()))


@given(n=st.integers(1, 5000), secret=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(n, secret):
    out = permute(np.arange(n), n, secret)
    assert np.array_equal(np.sort(out), np.arange(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(permute(some, n, secret), out[some])


def test_a_huge_permutation_looks_random():
    n = 10**15 + 7
    out = permute(np.arange(2000), n, mixed_key(1, 2))
    assert len(set(out.tolist())) == 2000
    assert out.min() >= 0
    assert out.max() < n
    assert abs(out.mean() / n - 0.5) < 0.03
    small = permute(np.arange(1000), 1000, mixed_key(3))
    assert abs(np.corrcoef(small, np.arange(1000))[0, 1]) < 0.1
    with pytest.raises(ValueError, match="outside"):
        permute(np.array([5]), 5, 0)


def test_key_depends_on_every_number():
    keys = {
        mixed_key(),
        mixed_key(0),
        mixed_key(0, 0),
        mixed_key(1),
        mixed_key(-1),
        mixed_key(1, 0),
        mixed_key(0, 1),
        mixed_key(2**64),
        mixed_key(2**64 + 1),
        mixed_key(-(2**64)),
    }
    assert len(keys) == 10


def make_streams(shards):
    dialogs = [(list(range(n)), [i % 3 != 0 for i in range(n)]) for n in (5, 9, 17, 4, 30, 8, 12, 33, 3)]
    plain = TokenStream(shards, 32, seed=5)
    packed = TokenStream(shards, 32, seed=5, documents=True)
    talk = DialogStream(dialogs, 32, seed=1, pad_id=511)
    mixed = MixStream([plain, talk], [0.7, 0.3], seed=9)
    return {"plain": plain, "packed": packed, "dialogs": talk, "mix": mixed}


@pytest.mark.parametrize("name", ["plain", "packed", "dialogs", "mix"])
@given(position=st.integers(0, 400), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_rows_do_not_depend_on_how_they_are_asked_for(shards, name, position, cuts):
    stream = make_streams(shards)[name]
    whole = stream.batch(position, sum(cuts))
    at, parts = position, []
    for count in cuts:
        parts.append(stream.batch(at, count))
        at += count
    same(whole, joined(parts))
    same(whole, make_streams(shards)[name].batch(position, sum(cuts)))


@pytest.mark.parametrize("name", ["plain", "packed", "dialogs", "mix"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_rows_of_all_ranks_are_the_global_batch(shards, name, ranks):
    stream = make_streams(shards)[name]
    whole = stream.batch(36, 12)
    share = 12 // ranks
    same(whole, joined([stream.batch(36 + rank * share, share) for rank in range(ranks)]))


@pytest.mark.parametrize("context", [1, 7, 32, 100])
def test_every_token_is_a_target_once_per_epoch(shards, context):
    stream = TokenStream(shards, context, seed=3)
    for epoch in range(3):
        starts = stream.starts(epoch * stream.n_rows, stream.n_rows)
        order = np.sort(starts)
        assert np.array_equal(np.diff(order), np.full(stream.n_rows - 1, context))
        assert order[0] + stream.n_rows * context + 1 <= shards.n_tokens
    first, second = (TokenStream(shards, 7, seed=3).starts(e * 100, 100).tolist() for e in (0, 1))
    assert first != second


def test_rows_are_consecutive_tokens_of_the_shards(shards):
    stream = TokenStream(shards, 16, seed=0)
    starts, batch = stream.starts(10, 5), stream.batch(10, 5)
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.documents_BT is None
    for row, start in enumerate(starts):
        expected = shards.tokens(int(start), int(start) + 17)
        assert batch.tokens_BT[row].tolist() == expected[:-1].tolist()
        assert batch.targets_BT[row].tolist() == expected[1:].tolist()


def test_rows_with_documents_restart_positions_and_never_predict_across(shards, byte_tokenizer):
    stream = TokenStream(shards, 64, seed=2, documents=True)
    batch = stream.batch(0, stream.n_rows)
    begins = batch.tokens_BT == byte_tokenizer.bos_id
    assert begins.any()
    assert (batch.positions_BT[begins] == 0).all()
    ends = batch.tokens_BT == byte_tokenizer.eos_id
    assert (batch.targets_BT[ends] == IGNORE).all()
    assert (batch.targets_BT[~ends] != IGNORE).all()
    grow = batch.documents_BT[:, 1:] - batch.documents_BT[:, :-1]
    assert torch.equal(grow == 1, begins[:, 1:])
    assert ((grow == 0) | (grow == 1)).all()
    assert (batch.documents_BT[:, 0] == 0).all()
    assert (batch.positions_BT[:, 0] == 0).all()
    inside = batch.positions_BT[:, 1:][~begins[:, 1:]] - batch.positions_BT[:, :-1][~begins[:, 1:]]
    assert (inside == 1).all()


def test_shards_shorter_than_a_row_are_refused(tmp_path, byte_tokenizer):
    one = Shards.write(tmp_path / "one", ["a"], byte_tokenizer)
    with pytest.raises(DataError, match=r"3 tokens do not fill one row of 8 \+ 1"):
        TokenStream(one, 8, seed=0)
    with pytest.raises(DataError, match="position"):
        TokenStream(one, 2, seed=0).batch(-1, 1)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=120), capacity=st.integers(40, 90), seed=st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_packing_keeps_every_dialog_within_the_row(lengths, capacity, seed):
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows = pack_rows(lengths, capacity, order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    # Best fit never leaves two rows that would go into one.
    assert sum(sum(lengths[i] for i in row) <= capacity // 2 for row in rows) <= 1


@given(sizes=st.lists(st.integers(2, 25), min_size=1, max_size=40), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_dialog_rows_hold_every_trained_token_once(sizes, seed):
    rng = np.random.default_rng(seed)
    dialogs, token = [], 0
    for n in sizes:
        mask = rng.random(n) < 0.5
        mask[-1] = True
        dialogs.append((list(range(token, token + n)), mask.tolist()))  # every token unique
        token += n
    stream = DialogStream(dialogs, 24, seed, pad_id=10**6)
    batch = stream.batch(stream.n_rows * seed, stream.n_rows)
    trained = batch.targets_BT[batch.targets_BT != IGNORE].tolist()
    assert sorted(trained) == sorted(
        i for ids, mask in dialogs for i, m in zip(ids[1:], mask[1:], strict=True) if m
    )
    # Each target follows its own token, in its own document, at its own position.
    hit = batch.targets_BT != IGNORE
    assert torch.equal(batch.tokens_BT[hit] + 1, batch.targets_BT[hit])
    first = {i: ids[0] for ids, _ in dialogs for i in ids}
    real = batch.tokens_BT != 10**6
    assert all(
        t - first[t] == p
        for t, p in zip(batch.tokens_BT[real].tolist(), batch.positions_BT[real].tolist(), strict=True)
    )
    for row in range(len(batch)):
        homes = {}
        for t, d in zip(batch.tokens_BT[row].tolist(), batch.documents_BT[row].tolist(), strict=True):
            homes.setdefault(d, set()).add(first.get(t, "pad"))
        assert all(len(of) == 1 for of in homes.values())


def test_a_dialog_of_exactly_the_context_fits_and_longer_ones_are_counted():
    fits, long = (list(range(9)), [True] * 9), (list(range(10)), [True] * 10)
    assert (DialogStream([fits], 8, 0, pad_id=0).batch(0, 1).targets_BT != IGNORE).all()
    with pytest.warns(DataWarning, match="left out 1 of 2 dialogs .* context=8 .*10"):
        assert len(DialogStream([fits, long], 8, 0, pad_id=0).dialogs) == 1
    with pytest.raises(DataError, match="1 are longer than the context"):
        DialogStream([long], 8, 0, pad_id=0)
    with pytest.raises(DataError, match="none to train on"):
        DialogStream([], 8, 0, pad_id=0)
    with pytest.raises(DataError, match="dialog 0: none of its"):
        DialogStream([([1, 2, 3], [True, False, False])], 8, 0, pad_id=0)
    with pytest.raises(DataError, match="one entry"):
        DialogStream([([1, 2, 3], [True])], 8, 0, pad_id=0)


def test_a_mixture_keeps_weights_and_orders(shards):
    a, b = TokenStream(shards, 16, seed=1), TokenStream(shards, 16, seed=2, documents=True)
    mix = MixStream([a, b], [3, 1], seed=4)
    assert mix.packed
    assert mix.block == 20
    assert mix.quota_P.tolist() == [15, 5]
    batch = mix.batch(0, 200)
    rows = [tuple(row) for row in batch.tokens_BT.tolist()]
    own = [[tuple(r) for r in s.batch(0, n).tokens_BT.tolist()] for s, n in ((a, 150), (b, 50))]
    assert sorted(rows) == sorted(own[0] + own[1])
    # Each part's rows keep their order.
    for part in own:
        places = iter(rows)
        assert all(any(row == r for r in places) for row in part)
    alone = MixStream([a], [1.0], seed=4)
    same(alone.batch(7, 5), a.batch(7, 5))


@pytest.mark.parametrize(
    "weights, match",
    [
        ([1, 0], "positive"),
        ([1], "one weight each"),
        ([1, 1e-9], "less than 1 row"),
        ([1, float("nan")], "pos"),
    ],
)
def test_an_impossible_mixture_is_refused(shards, weights, match):
    stream = TokenStream(shards, 16, seed=1)
    with pytest.raises(DataError, match=match):
        MixStream([stream, stream], weights, seed=0)
    with pytest.raises(DataError, match="contexts"):
        MixStream([stream, TokenStream(shards, 8, seed=1)], [1, 1], seed=0)


def test_packed_dialogs_have_the_loss_they_have_alone():
    """The model's loss on a packed row is the sum of its dialogs' losses alone: nothing leaks across
    documents.
    """
    from herd.llama.config import ModelConfig
    from herd.llama.model import LlamaLM

    torch.manual_seed(0)
    config = ModelConfig(64, 32, 2, 4, 2, 48, max_context=64, rope_theta=10_000.0)
    model = LlamaLM(config)
    model.init_weights(seed=1)
    rng = np.random.default_rng(0)
    dialogs = [(rng.integers(0, 60, n).tolist(), [False] * 2 + [True] * (n - 2)) for n in (7, 9, 12, 5)]

    def loss(stream):
        batch = stream.batch(0, stream.n_rows)
        hidden = model.model(batch.tokens_BT, batch.positions_BT, batch.attend)
        logits = model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()

    together = DialogStream(dialogs, 40, 0, pad_id=63)
    assert together.n_rows == 1
    alone = sum(loss(DialogStream([dialog], 11, 0, pad_id=63)) for dialog in dialogs)
    assert loss(together) == pytest.approx(alone, rel=1e-5)
