"""Every trained token of a repeating row can be predicted from the row itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.repetition import LONGEST, SHORTEST, RepetitionStream
from herd.errors import DataError


@given(position=st.integers(0, 10**9), context=st.integers(2 * SHORTEST, 300), seed=st.integers(0, 9))
def test_every_trained_token_occurred_before_at_one_distance(position: int, context: int, seed: int) -> None:
    batch = RepetitionStream(500, context, seed).batch(position, 1)
    ids = torch.cat([batch.tokens_BT[0], batch.targets_BT[0, -1:].clamp(min=0)]).tolist()
    for t, target in enumerate(batch.targets_BT[0].tolist()):
        if target >= 0:
            assert any(ids[t + 1 - d] == target for d in range(SHORTEST, LONGEST + 1) if t + 1 >= d)
    assert int(batch.tokens_BT.max()) < 500


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    stream = RepetitionStream(1000, 64, 3)
    whole = stream.batch(5, 7)
    for i in range(7):
        assert torch.equal(stream.batch(5 + i, 1).tokens_BT[0], whole.tokens_BT[i])
    assert (whole.targets_BT >= 0).float().mean() > 0.3


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(DataError, match="is too short for a passage twice"):
        RepetitionStream(100, 2 * SHORTEST - 1, 0)
