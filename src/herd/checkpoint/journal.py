"""A conversion that may be stopped at any moment, even by kill -9, and goes on where it was.

Where each tensor lies in the new files follows from shapes alone, and tensors are written in order. So all there is to
know is how many are done. The files grow in a folder beside the target, ``.NAME.part``, with a journal that is written
after every `SAVE_EVERY` bytes, once they are on the disk. The next run of the *same* conversion (same source files and
choices: the journal's ``key``) cuts off what was written since and goes on; another one begins anew. As ever, the
target appears whole or not at all.

What fails for its input's fault, or for a full disk, leaves nothing behind: it would fail again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError
from ..files import flush_folder, put_in_place, storage_error, write_atomically

FILE = "journal.json"
SAVE_EVERY = 256 << 20
"""Bytes written between two saves of the journal: what a kill costs at most."""


class Journal:
    """``done`` tensors are written, and ``notes`` (by part and tensor) are what their hashes were."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._unsaved = path, key, 0
        self.done = 0
        self.notes: dict[str, dict[str, str]] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # unreadable or not ours: begin anew
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                self.done, self.notes = int(known["done"]), {k: dict(v) for k, v in known["notes"].items()}

    def part(self, name: str) -> dict[str, str]:
        """The notes of one part of the work; what is put in is saved with the next save."""
        return self.notes.setdefault(name, {})

    def add(self, nbytes: int, file: IO[bytes]) -> None:
        """One more tensor is written to ``file``; now and then that is brought to the disk, and the journal says so."""
        self.done += 1
        self._unsaved += nbytes
        if self._unsaved >= SAVE_EVERY:
            file.flush()
            os.fsync(file.fileno())
            write_atomically(
                self._path, json.dumps({"key": self._key, "done": self.done, "notes": self.notes})
            )
            self._unsaved = 0

    def restart(self) -> None:
        """Forget it all: what is there is not what was expected."""
        self.done, self._unsaved = 0, 0
        self.notes.clear()


def key_of(sources: Iterable[Path], **choices: Any) -> str:
    """Names a conversion: its source files as they lie on the disk, and what was chosen."""
    files = []
    for path in sources:
        stat = path.stat()
        files.append((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr((files, sorted(choices.items()))).encode()).hexdigest()


@contextmanager
def resumable_folder(target: Path, key: str) -> Iterator[tuple[Path, Journal]]:
    """Yields a folder, and how far the same conversion came in it before; at the end it has become ``target``."""
    target = target.absolute().resolve() if target.is_symlink() else target.absolute()
    with _resumable(target, key, lambda part: put_in_place(part, target)) as found:
        yield found


@contextmanager
def resumable_file(target: Path, key: str) -> Iterator[tuple[Path, Journal]]:
    """`resumable_folder` for a single file: yields the path to write to."""
    target = target.absolute()
    with _resumable(target, key, lambda part: os.replace(part / target.name, target)) as (part, journal):
        yield part / target.name, journal


@contextmanager
def _resumable(target: Path, key: str, finish: Callable[[Path], None]) -> Iterator[tuple[Path, Journal]]:
    part = target.with_name(f".{target.name}.part")
    lock = None
    keep = False
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = _lock(part, target)
        journal = Journal(part / FILE, key)
        if not journal.done:
            _empty(part)
        yield part, journal
        (part / FILE).unlink(missing_ok=True)
        flush_folder(part)
        finish(part)
    except (KeyboardInterrupt, SystemExit):
        keep = (part / FILE).exists()
        raise
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        if lock is not None:
            if not keep:
                shutil.rmtree(part, ignore_errors=True)  # after an exchange this is the old folder
            os.close(lock)


def _lock(part: Path, target: Path) -> int:
    """Holds the folder for this process; the system lets go of it when the process ends, however it ends."""
    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(f"{target}: another process is writing it; wait for it, or stop it") from error
    return descriptor


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
