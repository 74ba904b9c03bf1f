"""Conversions that can be stopped at any moment, even by `kill -9`, and continued later.

The position of each tensor in the new files follows from the shapes, and tensors are written in order. So a
journal only needs the number of finished tensors. The files grow in a folder next to the target,
``.NAME.part``. The journal is saved after every `SAVE_EVERY` bytes, when these are on the disk. The next run
of the *same* conversion (same source files and options, as the journal's ``key``) truncates the files to the
journal's state and continues. Another conversion starts from the beginning. The target appears only when
everything is written. A conversion that fails because of its input or a full disk deletes its files, because
it would fail again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..files import flush_folder, put_in_place, storage_error, whole_folder, write_json
from ..machine import lock_folder

FILE = "journal.json"
LOCK = ".lock"
SAVE_EVERY = 256 << 20
"""Bytes written between two saves of the journal. At most this much work is lost by a kill."""


class Journal:
    """The progress of a conversion: number of ``done`` tensors, and ``notes`` (hashes by part and tensor)."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._unsaved = path, key, 0
        self.done = 0
        self.notes: dict[str, dict[str, str]] = {}
        # unreadable or from another conversion: start from the beginning
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                self.done, self.notes = int(known["done"]), {k: dict(v) for k, v in known["notes"].items()}

    def part(self, name: str) -> dict[str, str]:
        """Return the notes of one part of the work. The caller may add to them."""
        return self.notes.setdefault(name, {})

    def add(self, nbytes: int, file: IO[bytes]) -> None:
        """Count a tensor written to ``file``.

        After every `SAVE_EVERY` bytes, flush it and save the journal.
        """
        self.done += 1
        self._unsaved += nbytes
        if self._unsaved >= SAVE_EVERY:
            file.flush()
            os.fsync(file.fileno())
            write_json(self._path, {"key": self._key, "done": self.done, "notes": self.notes})
            self._unsaved = 0

    def restart(self) -> None:
        """Reset the journal, because the files are not as expected."""
        self.done, self._unsaved = 0, 0
        self.notes.clear()


def key_of(sources: Iterable[Path], **choices: Any) -> str:
    """Return the key of a conversion: a hash of the states of its source files and of its options."""
    files = []
    for path in sources:
        stat = path.stat()
        files.append((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr((files, sorted(choices.items()))).encode()).hexdigest()


@contextmanager
def new_folder(target: Path, key: str | None) -> Iterator[tuple[Path, Journal | None]]:
    """Yield a temporary folder that becomes ``target``.

    With a ``key``, the work has a journal and can resume.
    """
    if key is None:
        with whole_folder(target) as temporary:
            yield temporary, None
    else:
        target = target.absolute().resolve() if target.is_symlink() else target.absolute()
        with _resumable(target, key, lambda part: put_in_place(part, target)) as found:
            yield found


@contextmanager
def resumable_file(target: Path, key: str) -> Iterator[tuple[Path, Journal]]:
    """Yield a temporary path that becomes the file ``target``, and the journal of the work."""
    target = target.absolute()
    with _resumable(target, key, lambda part: os.replace(part / target.name, target)) as (part, journal):
        yield part / target.name, journal


@contextmanager
def _resumable(target: Path, key: str, finish: Callable[[Path], None]) -> Iterator[tuple[Path, Journal]]:
    part = target.with_name(f".{target.name}.part")
    keep = False
    try:
        part.mkdir(parents=True, exist_ok=True)
        with lock_folder(part):
            try:
                journal = Journal(part / FILE, key)
                if not journal.done:
                    _empty(part)
                yield part, journal
                for name in (FILE, LOCK):
                    (part / name).unlink(missing_ok=True)
                flush_folder(part)
                finish(part)
            except (KeyboardInterrupt, SystemExit):
                keep = (part / FILE).exists()
                raise
            finally:
                if not keep:
                    shutil.rmtree(part, ignore_errors=True)  # after the exchange this is the old folder
    except OSError as error:
        raise storage_error(target, error) from error


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
