"""Memory in large pages, if the system offers them.

Reading 4 GiB in pages of 4 KiB misses the TLB a million times, in pages of 2 MiB two thousand times. Under a
hypervisor each miss walks through two page tables. A large page begins at a multiple of its size, so a matrix
with its own allocation has small pages at both ends, and a small matrix has only those. Therefore weights
share large chunks.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

CHUNK = 256 << 20
"""Bytes of address space reserved at a time. Memory is assigned when it is first written."""
LINE = 64
"""Bytes of a cache line, to which pieces are aligned."""
_FLAGS = {"flags": 0x4000 | 0x20 | 0x02} if sys.platform == "linux" else {}
"""MAP_NORESERVE (Python has no name for it), MAP_ANONYMOUS and MAP_PRIVATE.

Shared memory never has large pages, so the mapping is private.
"""


def reserve(nbytes: int) -> Tensor:
    """Return ``nbytes`` of uint8 zeros. Memory is assigned when it is first written. Raises OSError."""
    memory = mmap.mmap(-1, nbytes, **_FLAGS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Chunks:
    """An allocator of consecutive pieces of memory. A chunk is freed with the last of its pieces."""

    def __init__(self, nbytes: int = CHUNK) -> None:
        self.nbytes = nbytes
        self._chunk, self._at = torch.empty(0, dtype=torch.uint8), 0
        self._lock = threading.Lock()

    def piece(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` of uint8 that begin at a multiple of `LINE`."""
        with self._lock:
            if self._at + nbytes > len(self._chunk):
                self._chunk, self._at = reserve(max(self.nbytes, nbytes)), 0
            start, self._at = self._at, self._at + -(-nbytes // LINE) * LINE
            return self._chunk[start : start + nbytes]

    def close(self) -> None:
        """Begin a new chunk with the next piece, so that models loaded in turn can be freed in turn."""
        with self._lock:
            self._chunk, self._at = torch.empty(0, dtype=torch.uint8), 0


chunks = Chunks()
"""The memory of this process's weights."""
