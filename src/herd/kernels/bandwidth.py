"""How fast this machine reads memory: what decoding is measured against.

A decode step reads every weight once, so its floor is bytes over bandwidth, and the bandwidth of a data sheet is not
what a program can draw. This reads a buffer far larger than any cache, in huge pages where the system has them, each
thread its own stretch of it, and adds up the words so that no load can be left out: what a kernel could reach that did
nothing but read. (Prefetching by hand, at any distance, gains a few hundredths on Zen 4.)
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from . import build
from .large_pages import reserve

BUFFER = 1 << 30
"""Bytes: some thirty times the last-level cache of a large processor's core complex."""


class MemoryReader:
    """A buffer to read again and again; `measure` takes turns with whatever else is measured."""

    def __init__(self, nbytes: int | None = None) -> None:
        """``nbytes`` (None: `BUFFER`) are taken for as long as this lives."""
        self.words = reserve(nbytes or BUFFER).view(torch.int64)
        self.words.fill_(1)  # every page becomes its own memory; unwritten ones would all be the same zeros

    def measure(self, seconds: float = 0.3) -> float:
        """Bytes a second, the median of as many passes as fill ``seconds``, with torch's current number of threads."""
        passes: list[float] = []
        while not passes or sum(passes) < seconds:
            start = time.perf_counter()
            if read_all(self.words) != self.words.numel():
                raise AssertionError(
                    "the sum of ones is wrong: this machine's memory or the kernel is broken"
                )
            passes.append(time.perf_counter() - start)
        return self.words.nbytes / statistics.median(passes)


def read_bandwidth(threads: int | None = None, *, nbytes: int | None = None, seconds: float = 0.3) -> float:
    """Bytes a second that ``threads`` threads (None: torch's number) read from memory; takes a second."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        reader = MemoryReader(nbytes)
        reader.measure(0)
        return reader.measure(seconds)
    finally:
        torch.set_num_threads(before)


def read_all(words: Tensor) -> int:
    """The sum of int64 ``words``, wrapping; the native kernel reads whole blocks of 64 words and leaves a rest out."""
    if words.device.type == "cpu" and words.numel() % 64 == 0 and build.ready():
        return torch.ops.herd_native.read_all(words)
    return int(words.sum())
