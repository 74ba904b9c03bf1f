"""A folder appears whole or not at all.

A checkpoint is many files; a reader must never meet half of them. So a folder is written under a temporary name beside
its final one, every file is flushed to the disk, and one rename makes it real. An existing folder is exchanged with
the new one in a single system call where the kernel has it (Linux `renameat2` with `RENAME_EXCHANGE`); elsewhere the
old one steps aside under a temporary name first, and steps back if the second rename fails. Whatever goes wrong before
that moment, a full disk included, what existed stays as it was and the temporary folder is removed. A kill -9 leaves a
temporary folder behind; the next write to the same place removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; when the block ends without an error, it has become ``target``.

    Raises `CheckpointError` for a full disk or a target that cannot be written; other errors pass through. In each
    case ``target`` is as it was.
    """
    target = Path(target).absolute()
    if target.is_symlink():
        target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary = target.parent / _temporary_name(target)
        temporary.mkdir()
    except OSError as error:
        raise readable(target, error) from error
    try:
        yield temporary
        flush(temporary)
        put_in_place(temporary, target)
    except OSError as error:
        raise readable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange this is the old folder


def require_room(target: Path, nbytes: int) -> None:
    """Raises `CheckpointError` when the disk under ``target`` has less than ``nbytes`` free."""
    parent = Path(target).absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{target}: needs {nbytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room or take another"
        )


def _temporary_name(target: Path) -> str:
    return f".{target.name}.tmp-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_leftovers(target: Path) -> None:
    """Removes temporary folders of ``target`` whose process, on this machine, is gone."""
    prefix = f".{target.name}.tmp-{platform.node()}-"
    for entry in target.parent.iterdir():
        if not entry.name.startswith(prefix):
            continue
        pid = entry.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def flush(folder: Path) -> None:
    """fsync of every file and folder, so that the rename cannot reach the disk before the contents."""
    for root, _, names in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in names), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name + "-old")
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names atomically; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def readable(target: Path, error: OSError) -> CheckpointError:
    if error.errno in _NO_ROOM:
        return CheckpointError(
            f"{target}: no room left on the disk; nothing was changed, make room and try again"
        )
    return CheckpointError(f"{target}: cannot write: {error.strerror or error}; nothing was changed")
