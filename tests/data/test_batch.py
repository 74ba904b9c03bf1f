"""A batch: aligned tensors, and extra ones that follow its rows."""

import numpy as np
import pytest
import torch

from herd.data.batch import Batch, concatenate
from herd.data.stream import MixStream
from herd.errors import DataError


def batch(rows: int, **extras) -> Batch:
    tokens = torch.arange(rows * 4).view(rows, 4)
    return Batch(tokens, tokens + 1, extras=extras)


def test_extras_follow_the_rows():
    whole = batch(3, probabilities=torch.rand(3, 4, 2), weight=torch.tensor([1.0, 2.0, 3.0]))
    part = whole.rows(1, 3).to("cpu")
    assert torch.equal(part.tokens_BT, whole.tokens_BT[1:])
    assert torch.equal(part.extras["probabilities"], whole.extras["probabilities"][1:])
    assert part.extras["weight"].tolist() == [2.0, 3.0]


def test_an_extra_with_another_number_of_rows_is_refused():
    with pytest.raises(DataError, match=r"batch extra weight has shape \(2,\) for 3 rows"):
        batch(3, weight=torch.ones(2))


def test_joined_batches_keep_their_extras_and_must_carry_the_same():
    first, second = batch(2, weight=torch.ones(2)), batch(1, weight=torch.zeros(1))
    assert concatenate([first, second]).extras["weight"].tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(DataError, match=r"extras \['weight'\] and \[\] cannot be joined"):
        concatenate([first, batch(1)])


def test_a_mixture_keeps_extras_with_their_rows():
    class Numbered:
        context, n_rows = 4, 100

        def __init__(self, offset: int, packed: bool) -> None:
            self.offset, self.packed = offset, packed

        def batch(self, position: int, count: int) -> Batch:
            number = torch.from_numpy(np.arange(position, position + count)) + self.offset
            tokens = number[:, None].expand(count, 4).contiguous()
            documents = torch.zeros_like(tokens) if self.packed else None
            return Batch(tokens, tokens, documents, documents, {"number": number})

    mixed = MixStream([Numbered(0, False), Numbered(1000, True)], [0.5, 0.5], 0).batch(3, 9)
    assert torch.equal(mixed.extras["number"], mixed.tokens_BT[:, 0])
    assert mixed.documents_BT is not None
