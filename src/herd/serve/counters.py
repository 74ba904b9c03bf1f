"""A file of counters, one for each open request, that survives `kill -9` of the server.

The counters are 64-bit words in a file that is mapped into memory: one for each request with the tokens of
its answer, and one with those of its prompt (`PROMPT`). To advance one is a single store into shared memory,
about 0.1 µs. When the process dies, however it dies, the kernel keeps the page and writes it to the disk. So
the counters are exact after `kill -9`. After a power failure they may be up to some seconds old, which never
bills too much. A transaction for each token would cost a thousand times more and survive the same kills.

The file's blocks are allocated when it is made, because a write to a hole of a mapped file on a full disk
ends the process (SIGBUS). The process holds a lock on the file as long as it lives. A file that can be locked
belongs to a dead process, and its counters can be settled.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import storage_error
from .errors import ApiError

SLOTS = 16_384
"""Most requests that one server can have open."""
PROMPT = SLOTS
"""Offset of a request's counter of prompt tokens. 0 in that counter means the reserved number."""
SUFFIX = ".counters"
_NBYTES = 2 * SLOTS * 8
_BEGUN, _TOKEN_BITS = 1 << 63, 31


class CounterFile:
    """The counters of this process in the new file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(self._descriptor, 0, _NBYTES)
        except OSError as error:
            raise storage_error(path, error) from error
        self._map = mmap.mmap(self._descriptor, _NBYTES)
        self.words = memoryview(self._map).cast("Q")
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._used = 0

    def take(self) -> int:
        """Return the index of counters that are zero and belong to nobody else until `give_back`."""
        with self._lock:
            if self._free:
                slot = self._free.pop()
            elif self._used < SLOTS:
                slot, self._used = self._used, self._used + 1
            else:
                message = f"the server has {SLOTS} open requests; try again later"
                raise ApiError(message, status=503, code="overloaded", retry_after=1.0)
        self.words[slot] = self.words[slot + PROMPT] = 0
        return slot

    def give_back(self, slot: int) -> None:
        """Free the counters of a request that is settled."""
        with self._lock:
            self._free.append(slot)

    def close(self) -> bool:
        """Unlock the file, and delete it if no counter is in use. Return whether it was deleted."""
        empty = len(self._free) == self._used
        if empty:
            self.path.unlink(missing_ok=True)
        self.words.release()
        self._map.close()
        os.close(self._descriptor)
        return empty


def pack(completion_tokens: int, cached_tokens: int) -> int:
    """Return the counter of a request that has begun to answer."""
    return _BEGUN | cached_tokens << _TOKEN_BITS | completion_tokens


def unpack(word: int) -> tuple[bool, int, int]:
    """Return whether the answer has begun, its completion tokens and the cached tokens of its prompt."""
    mask = (1 << _TOKEN_BITS) - 1
    return bool(word & _BEGUN), word & mask, word >> _TOKEN_BITS & mask


@contextmanager
def counters_of_dead(path: Path) -> Iterator[list[int] | None]:
    """Yield the counters in the file of a process that has ended, or None if it lives or the file is gone.

    The file is locked inside the block, so that only one process settles its requests.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield None
    else:
        data = os.pread(descriptor, _NBYTES, 0).ljust(_NBYTES, b"\0")  # shorter: killed while it was made
        yield list(memoryview(data).cast("Q"))
    finally:
        os.close(descriptor)
