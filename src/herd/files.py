"""Write files and folders so that no reader ever sees a part of one.

A file is written under a temporary name in the same folder, flushed to the disk and renamed. A folder (a
checkpoint has many files) is written under a temporary name next to its final one, every file is flushed, and
one rename puts it in place. An existing folder is exchanged with the new one in a single system call if the
kernel has it (Linux `renameat2` with `RENAME_EXCHANGE`). Otherwise the old folder is moved aside first, and
moved back if the second rename fails. If anything goes wrong before that moment, a full disk included, the
old file or folder is unchanged and the temporary one is removed. A `kill -9` leaves a temporary folder, which
the next write to the same target removes.

Every function here that writes raises `StorageError` when the disk is full or the target cannot be written.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import units
from .errors import StorageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of ``path`` (text is encoded as UTF-8), creating missing parent folders."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of ``path`` by ``value`` in JSON. Names that are not UTF-8 become escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target`` that becomes it when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(target)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``target`` when the block ends without an error."""
    target = Path(target).absolute()
    if target.is_symlink():
        target = target.resolve()
    with folder_beside(target) as temporary:
        try:
            yield temporary
            flush_folder(temporary)
            put_in_place(temporary, target)
        except StorageError as error:  # from a file inside: name the folder that the user asked for
            cause = error.__cause__
            raise (storage_error(target, cause) if isinstance(cause, OSError) else error) from cause
        except OSError as error:
            raise storage_error(target, error) from error


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to ``target``, and remove it when the block ends.

    Those of processes that were killed are removed too.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary = target.parent / f"{_temporary_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise storage_error(target, error) from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange this is the old folder


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the disk of ``path``, which need not exist yet."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free_space(target: Path, nbytes: int) -> None:
    """Raise `StorageError` when the disk of ``target`` has less than ``nbytes`` free."""
    free = free_disk_bytes(target)
    if free < nbytes:
        raise StorageError(
            f"{target}: needs {units.nbytes(nbytes)}, and the disk has {units.nbytes(free)} free; "
            "free some disk space or choose another folder"
        )


def require_own(folder: Path, mark: str, names: Iterable[str]) -> None:
    """Raise `StorageError` if a folder has one of ``names``, which a run would replace, but not ``mark``.

    ``mark`` is a file that every run of this kind writes first. So nothing is lost that no run has made. Also
    raised for a path that is not UTF-8, which the recipes and records of a run could not hold.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise StorageError(f"{str(folder.absolute())!a}: is not UTF-8; choose another --out") from None
    if not (folder / mark).exists():
        for name in names:
            if (folder / name).exists():
                raise StorageError(
                    f"{folder / name}: is there already and would be replaced, and {folder} has no {mark} of "
                    "an earlier run; choose another --out"
                )


def flush_folder(folder: Path) -> None:
    """Flush every file and folder below ``folder`` to the disk, before the folder is renamed."""
    for root, _, names in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in names), root]:
            _fsync(path)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename the folder ``temporary`` to ``target``. An old ``target`` is exchanged with it, or removed."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name + "-old")
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _fsync(target.parent)


def storage_error(target: Path, error: OSError) -> StorageError:
    """Return the one-line error for a system ``error`` while ``target`` was written."""
    if error.errno in _DISK_FULL:
        return StorageError(f"{target}: the disk is full; nothing was changed, free some space and try again")
    why = error.strerror or error
    return StorageError(f"{target}: cannot write: {why}; nothing was changed, choose another place")


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.tmp-{platform.node()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of ``target`` whose process, on this machine, has ended."""
    prefix = _temporary_prefix(target)
    for entry in target.parent.iterdir():
        if not entry.name.startswith(prefix):
            continue
        pid = entry.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _is_running(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically. Return False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
