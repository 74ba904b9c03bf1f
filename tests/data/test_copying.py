"""Rows of repeated passages: every trained token follows the only earlier occurrence of the one before it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.copying import FEW_IDS, CopyStream, draw_alphabet
from herd.errors import DataError


@given(position=st.integers(0, 10**9), context=st.integers(8, 300), n_ids=st.integers(20, 5000))
def test_an_induction_head_is_always_right(position: int, context: int, n_ids: int) -> None:
    """The oracle: predict the token that followed the last occurrence of the current one."""
    batch = CopyStream(n_ids, context, 7).batch(position, 1)
    follower: dict[int, int] = {}
    n_trained = 0
    ids = batch.tokens_BT[0].tolist()
    for t, target in enumerate(batch.targets_BT[0].tolist()):
        if target >= 0:
            n_trained += 1
            assert follower[ids[t]] == target
        else:
            assert ids[t] not in follower  # the first pass has different tokens only
        if t + 1 < context:
            follower[ids[t]] = ids[t + 1]
    assert n_trained >= context // 2 - 1 or n_trained >= context - n_ids
    assert max(ids) < n_ids


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    stream = CopyStream(1000, 64, 3)
    whole = stream.batch(5, 7)
    for i in range(7):
        assert torch.equal(stream.batch(5 + i, 1).tokens_BT[0], whole.tokens_BT[i])


def test_alphabets_are_of_all_sizes() -> None:
    sizes = [draw_alphabet(np.random.default_rng(i), 4096) for i in range(2000)]
    assert FEW_IDS <= min(sizes) <= 70
    assert 3900 <= max(sizes) <= 4096
    assert 400 < float(np.median(sizes)) < 650  # 512 is the middle of 64 and 4,096 on a logarithmic scale


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(DataError, match="is too short to repeat a passage"):
        CopyStream(100, 7, 0)
