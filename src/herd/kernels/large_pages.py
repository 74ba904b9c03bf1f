"""Memory in large pages, where the system gives them for the asking.

Reading 4 GiB in pages of 4 KiB misses the TLB a million times, in pages of 2 MiB two thousand times; under a hypervisor
each miss is a walk through two page tables. But a large page begins at a multiple of its size, so a matrix with memory
of its own has small pages at both ends, and a small matrix has nothing else. So weights share chunks (`piece`).
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

CHUNK = 256 << 20
"""Bytes of addresses taken at a time; memory comes when they are written to."""
LINE = 64
_FLAGS = {"flags": 0x4000 | 0x20 | 0x02} if sys.platform == "linux" else {}
"""MAP_NORESERVE, for which Python has no name, MAP_ANONYMOUS, and MAP_PRIVATE: shared memory never has large pages."""


def reserve(nbytes: int) -> Tensor:
    """``nbytes`` of zeros, uint8: addresses now, memory when they are written to. Raises OSError if there are none."""
    memory = mmap.mmap(-1, nbytes, **_FLAGS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Chunks:
    """Hands out pieces of memory one behind the other; a chunk is given back when the last of its pieces is gone."""

    def __init__(self, nbytes: int = CHUNK) -> None:
        self.nbytes = nbytes
        self._chunk, self._at = torch.empty(0, dtype=torch.uint8), 0
        self._lock = threading.Lock()

    def piece(self, nbytes: int) -> Tensor:
        """``nbytes``, uint8, at a multiple of `LINE`."""
        with self._lock:
            if self._at + nbytes > len(self._chunk):
                self._chunk, self._at = reserve(max(self.nbytes, nbytes)), 0
            start, self._at = self._at, self._at + -(-nbytes // LINE) * LINE
            return self._chunk[start : start + nbytes]


chunks = Chunks()
"""Where the weights of this process lie."""
