"""Find the cores, memory and cache folder that this process may use, and the memory it has used.

Linux control groups (versions 1 and 2), which containers and batch systems use to limit a process, are
respected: a limit set on any parent group counts. Elsewhere the numbers of the operating system are returned.
Imports no torch.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import StorageError

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def cores() -> int:
    """Return the number of cores this process may use: its affinity mask, or the CPU quota if lower."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders("cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([allowed, *(round(quota) for quota in quotas)]))


def limit_spinning() -> None:
    """Make waiting threads sleep after about 50 µs instead of milliseconds. Call it before torch is imported.

    With GNU OpenMP's default, threads that wait for others keep a core busy. If another program needs that
    core, the threads they wait for do not run: `herd raise --quick` took 107 s on two cores next to a
    two-process program, 26 s with this limit, and 9.4 s alone with or without it (AMD EPYC, 2 cores).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory. Return whether it could, which needs glibc.

    glibc returns every freed block over 32 MB at once and gets the next one back page by page, zeroed: some
    400,000 page faults per training step, for tensors of the same few sizes, and thousands per layer of a
    prompt. Call it at the start of a process, never on import.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def load_torch_libraries() -> None:
    """Begin to load torch's largest library in another thread, as `import torch` does, and return at once.

    Loading takes 0.15 of the second that `import torch` takes, and other work that does not need torch can be
    done meanwhile. Set the number of threads before, and call `limit_spinning`.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = Path(spec.origin).parent / "lib" / f"libtorch_cpu.{suffix}"

    def load() -> None:
        with suppress(OSError):  # `import torch` will say what is wrong
            ctypes.CDLL(str(library))

    threading.Thread(target=load, daemon=True).start()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Do not collect garbage in the block, which makes objects that live as long as the process.

    While torch is imported the collector would run a hundred times, for 0.1 s or more, and find nothing.
    After the block it does not look at these objects again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def total_memory() -> int:
    """Return the physical memory in bytes, or the memory limit of the process's control groups if lower."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Return the bytes of memory that can be allocated now without swapping."""
    import psutil

    free = [limit - used for limit, used in _memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *free]))


def cache_folder() -> Path:
    """Return the folder for data that can be made again: ``HERD_CACHE``, or ``~/.cache/herd``."""
    return Path(os.environ.get("HERD_CACHE") or Path.home() / ".cache" / "herd")


def resident_memory() -> int:
    """Return the bytes of memory that this process uses now (its resident set)."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak_memory() -> None:
    """Start measuring `peak_memory` again from the present resident set, if the system can (Linux).

    Freed memory is returned to the system first, so that it does not count towards the new peak.
    """
    return_freed_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Return freed memory that the C library keeps to the system, if it can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Return the largest resident set in bytes since `reset_peak_memory`, or since the process began."""
    import resource

    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@contextmanager
def lock_folder(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Lock ``folder``, which is created if it is missing, for this process by the file ``name``.

    The system releases the lock however the process ends. Raises `StorageError` if the folder cannot be
    written, and, with the number of the other process, if it is locked already.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / name).open("a+")
    except OSError as error:
        why = f"cannot be written as a folder ({error.strerror}); choose another"
        raise StorageError(f"{folder}: {why}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip()
            which = f"process {holder}" if holder else "another process"
            raise StorageError(
                f"{folder}: {which} is working in this folder; wait until it ends, or choose another folder"
            ) from None
        with suppress(OSError):  # the number is for others to read: on a full disk it is left out
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


def _cgroup_folders(controller: str) -> list[Path]:
    """Return the control group folders that limit this process for ``controller``, innermost first."""
    try:
        lines = PROC_CGROUP.read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2: one tree for all controllers
            root = CGROUP_ROOT
        elif controller in controllers.split(","):
            root = CGROUP_ROOT / controllers
            root = root if root.is_dir() else CGROUP_ROOT / controller
        else:
            continue
        # Inside a container the group's own path may not be visible. Its root is then the container's group.
        inner = root / group.lstrip("/")
        inside = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
        folders += [folder for folder in inside if folder.is_dir()]
    return folders


def _cpu_quota(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        microseconds = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
        return None if microseconds <= 0 else microseconds / period_us
    return None


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of each control group that limits this process.

    File pages that are not in active use are counted as used by the kernel, but it gives them up on demand.
    """
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _cgroup_folders("memory"):
        for limit_name, used_name, inactive_name in names:
            with suppress(OSError, ValueError):
                text = (folder / limit_name).read_text().strip()
                if text == "max" or int(text) >= 1 << 60:  # version 1 writes a huge number for no limit
                    continue
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / used_name).read_text()) - int(stat.get(inactive_name, 0))
                yield int(text), used
