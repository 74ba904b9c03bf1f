"""Keep freed memory, for processes that train on a CPU.

glibc returns every freed block over 32 MB to the kernel at once and gets the next one back page by page,
zeroed: some 400,000 page faults per training step, for tensors of the same few sizes. A training process
needs them again within milliseconds, so it is faster to keep them. Call `keep_freed_memory` at the start of a
process, never on import.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc's malloc reuse freed memory instead of returning it to the kernel.

    Return False without glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
