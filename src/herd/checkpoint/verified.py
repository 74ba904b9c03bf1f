"""A cache of the hashes of large files that have been verified.

Hashing 4.7 GB takes as long as the rest of loading, and the hash of an unchanged file is the same. So the
hash of a verified file is stored with its device, inode, size, and the times of its last modification and
last status change (a program cannot set the latter back). If any of them differs, the file is hashed again. A
disk that silently returns wrong bytes is not noticed. ``HERD_VERIFY=always`` hashes at every load.

The cache is in the cache folder and not next to the file, because folders may be read-only, and a copied
folder must not confirm its own hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from ..files import write_json
from ..machine import cache_folder, cores

HASH_PIECE = 64 << 20


def verified_hash(path: Path, hash_of: Callable[[Path], str]) -> str:
    """Return ``hash_of(path)``, or the stored result if the file has not changed since."""
    state = _state(path)
    note = (
        cache_folder() / "verified" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    )
    if os.environ.get("HERD_VERIFY") != "always":
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["state"] == state:
                return str(known["hash"])
    found = hash_of(path)
    if _state(path) == state:  # not changed during hashing
        with suppress(StorageError):  # without a cache folder it is hashed again next time
            write_json(note, {"file": str(path.resolve()), "state": state, "hash": found})
    return found


def hash_file(path: Path) -> str:
    """Return the SHA-256 over the SHA-256 of each 64 MiB of a file, computed on several cores."""
    starts = range(0, path.stat().st_size, HASH_PIECE)
    with ThreadPoolExecutor(min(8, cores())) as pool:
        digests = b"".join(pool.map(lambda at: _hash_piece(path, at), starts))
    return hashlib.sha256(b"gguf" + digests).hexdigest()


def _hash_piece(path: Path, start: int) -> bytes:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = HASH_PIECE
        while left and (data := file.read(min(left, 1 << 20))):
            sha.update(data)
            left -= len(data)
    return sha.digest()


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
