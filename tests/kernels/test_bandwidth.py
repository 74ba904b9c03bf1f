"""Reading memory: every word is read. Speeds are not asserted."""

import numpy as np
import torch

from herd.kernels import build
from herd.kernels.bandwidth import MemoryReader, read_all


def test_every_word_is_read(monkeypatch):
    words = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 64 * 5000, dtype=np.int64))
    expected = int(words.numpy().sum())
    assert read_all(words) == expected
    words[-1] += 1
    assert read_all(words) == expected + 1
    monkeypatch.setattr(build, "ready", lambda: False)
    assert read_all(words) == expected + 1


def test_words_beyond_a_multiple_of_64_are_counted():
    assert read_all(torch.ones(64 * 3 + 5, dtype=torch.int64)) == 64 * 3 + 5


def test_measuring_gives_a_speed():
    assert MemoryReader(1 << 20).measure(0) > 0
