"""Which large files have been compared with their hash already, as they stand on this disk.

Hashing 4.7 GB takes as long as all the rest of a load, and a file that nobody has touched since cannot give another
hash. So what was verified is noted with what the system knows of the file: device, inode, size, time of the last
modification and of the last change of any kind (which no program can set back). Whatever differs, it is hashed again.
What this does not see is a disk that returns other bytes than were written, without an error; ``HERD_VERIFY=always``
hashes at every load.

The notes lie in ``~/.cache/herd`` (or ``HERD_CACHE``), not beside the file: folders may be read-only, and a copied
folder must not vouch for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from ..files import write_atomically


def verified_hash(path: Path, take: Callable[[Path], str]) -> str:
    """The hash of ``path`` as ``take`` gives it, or gave it while the file was just as it is now."""
    state = _state(path)
    note = _folder() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    if os.environ.get("HERD_VERIFY") != "always":
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["state"] == state:
                return str(known["hash"])
    found = take(path)
    if _state(path) == state:  # not written meanwhile
        with suppress(StorageError):  # without a cache folder the file is hashed again next time
            write_atomically(note, json.dumps({"file": str(path.resolve()), "state": state, "hash": found}))
    return found


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _folder() -> Path:
    return Path(os.environ.get("HERD_CACHE") or Path.home() / ".cache" / "herd") / "verified"
