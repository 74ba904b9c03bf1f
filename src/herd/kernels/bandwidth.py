"""Measure how fast this machine reads memory, which bounds the speed of decoding.

A decode step reads every weight once, so it takes at least bytes / bandwidth, and programs do not reach the
bandwidth of a data sheet. This reads a buffer far larger than any cache, in large pages if the system has
them. Each thread reads its own part and adds up the words, so that no load can be optimized away: a kernel
that did nothing but read would reach this speed. (Prefetching by hand, at any distance, gains a few
hundredths on Zen 4.)
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from . import build
from .large_pages import reserve

BUFFER = 1 << 30
"""Bytes: about thirty times the last-level cache of a large processor's core complex."""


class MemoryReader:
    """A buffer to read repeatedly, so that `measure` can alternate with whatever is compared with it."""

    def __init__(self, nbytes: int | None = None) -> None:
        """Allocate ``nbytes`` (None: `BUFFER`) for the lifetime of this object."""
        self.words = reserve(nbytes or BUFFER).view(torch.int64)
        self.words.fill_(1)  # gives every page its own memory: unwritten pages would all be the same zeros

    def measure(self, seconds: float = 0.3) -> float:
        """Return bytes per second with torch's threads, the median of all passes in ``seconds``."""
        passes: list[float] = []
        while not passes or sum(passes) < seconds:
            start = time.perf_counter()
            if read_all(self.words) != self.words.numel():
                raise AssertionError(
                    "the sum of ones is wrong: this machine's memory or the kernel is broken"
                )
            passes.append(time.perf_counter() - start)
        return self.words.nbytes / statistics.median(passes)


def read_all(words: Tensor) -> int:
    """Return the wrapping sum of int64 ``words``, with torch if their number is not a multiple of 64."""
    if words.device.type == "cpu" and words.numel() % 64 == 0 and build.ready():
        return torch.ops.herd_native.read_all(words)
    return int(words.sum())
