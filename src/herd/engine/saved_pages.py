"""Keep the pages of computed prompts in a folder, so that a restarted server need not compute them again.

The preamble of a coding agent has 7,000 to 19,000 tokens, which is minutes of work on a CPU and seconds of
reading. Each full page is a file: the page's bytes and a checksum of them, of the page's hash (`pages.py`),
which covers all tokens before it and the tenant, and of the fingerprint of model and cache. So a page is
never used for another model, another text or another tenant, and a damaged file is ignored. A thread writes
the files. The folder is bounded, and what has not been asked for longest is deleted first, of any model.

Whoever can read the folder can reconstruct prompts from it, so it is readable by its owner only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import units
from ..errors import StorageError
from ..files import storage_error, write_atomically
from ..kernels.page_layout import PAGE
from .cache import PagedCache
from .pages import Cached

PENDING_BYTES = 256 << 20
"""Most bytes that wait for the disk. If it is too slow, later pages are not saved this time."""
LAYOUT = 1
"""Number of the layout of a page's bytes. A new layout gets a new number, so that old pages are not read."""
CHECKSUM_BYTES = 16
PIECE_BYTES = 16 << 20
"""Bytes of a weight that are hashed as one piece."""

_log = logging.getLogger(__name__)


class SavedPages:
    """The pages of ``cache`` in ``folder``, at most as many bytes as the cache may have.

    ``model`` is the model whose keys and values they are. Hashing it takes a second for each GB or two.
    """

    def __init__(self, folder: str | Path, cache: PagedCache, model: nn.Module) -> None:
        self.root, self.cache = Path(folder), cache
        self.max_bytes = cache.pages.limit * (cache.page_bytes + CHECKSUM_BYTES)
        layout = repr((LAYOUT, PAGE, cache.kind, cache.config))
        self._fingerprint = hashlib.sha256(layout.encode() + hash_model(model)).digest()
        self.folder = self.root / self._fingerprint.hex()[:32]
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from None
        self._saved: set[bytes] = set()
        self._pending, self._lock = 0, threading.Lock()
        self._queue: queue.SimpleQueue[tuple[list[bytes], dict[bytes, Tensor]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="herd-saved-pages", daemon=True)
        self._writer.start()

    def load(self) -> int:
        """Copy the pages of this model from the folder to the cache, and return their number.

        Warns about damaged files, and deletes them. Call it before the first request.
        """
        start, damaged, n = time.monotonic(), 0, 0
        pages = self.cache.pages
        for file in _by_age([self.folder])[-pages.limit :]:
            if (data := self._read(file)) is None:
                damaged += 1
                with suppress(OSError):
                    file.unlink()
                continue
            digest, page = bytes.fromhex(file.stem), pages.take()
            self.cache.pool[page] = torch.frombuffer(data, dtype=torch.uint8).view(
                self.cache.pool[page].shape
            )
            pages.remember(page, digest)
            pages.give([page])
            self._saved.add(digest)
            n += 1
        if damaged:
            warnings.warn(f"{self.folder}: ignoring {damaged} damaged files of cached prompts", stacklevel=2)
        if n:
            size, seconds = units.nbytes(n * self.cache.page_bytes), time.monotonic() - start
            _log.info("read %d pages (%s) of cached prompts in %.1f s", n, size, seconds)
        return n

    def save(self, cached: Cached) -> None:
        """Save the full pages of a sequence that are not saved yet, and note that all were asked for."""
        pages: dict[bytes, Tensor] = {}
        for digest, page in zip(cached.digests, cached.pages, strict=False):
            if digest in self._saved:
                continue
            with self._lock:
                if self._pending + self.cache.page_bytes > PENDING_BYTES:
                    break
                self._pending += self.cache.page_bytes
            pages[digest] = self.cache.pool[page].to("cpu", copy=True)
            self._saved.add(digest)
        self._queue.put((list(cached.digests), pages))

    def close(self) -> None:
        """Return when all pages are written."""
        self._queue.put(None)
        self._writer.join()

    def _path(self, digest: bytes) -> Path:
        return self.folder / f"{digest.hex()}.page"

    def _checksum(self, digest: bytes, data: bytes | bytearray | memoryview) -> bytes:
        checksum = hashlib.blake2b(self._fingerprint + digest, digest_size=CHECKSUM_BYTES)
        checksum.update(data)
        return checksum.digest()

    def _read(self, file: Path) -> bytearray | None:
        """Return the bytes of a page, or None if the file is damaged."""
        try:
            data, digest = bytearray(file.read_bytes()), bytes.fromhex(file.stem)
        except (OSError, ValueError):
            return None
        checksum = bytes(data[-CHECKSUM_BYTES:])
        del data[-CHECKSUM_BYTES:]
        if len(data) != self.cache.page_bytes or self._checksum(digest, data) != checksum:
            return None
        return data

    def _write_all(self) -> None:
        """Write what is in the queue until it ends. After a failure of the disk, write nothing more."""
        failed = False
        while (work := self._queue.get()) is not None:
            digests, pages = work
            try:
                if not failed:
                    self._write(digests, pages)
            except (OSError, StorageError) as error:
                failed = True
                _log.warning("cached prompts are no longer saved: %s", error)
            with self._lock:
                self._pending -= len(pages) * self.cache.page_bytes

    def _write(self, digests: list[bytes], pages: dict[bytes, Tensor]) -> None:
        for digest, page in pages.items():
            data = page.numpy().tobytes()
            write_atomically(self._path(digest), data + self._checksum(digest, data))
        # the first page is the youngest: without it the others are useless, so it must be deleted last
        now = time.time_ns()
        for index, digest in enumerate(digests):
            with suppress(FileNotFoundError):
                os.utime(self._path(digest), ns=(now, now - index))
        files = _by_age([folder for folder in self.root.iterdir() if folder.is_dir()])
        excess = sum(file.stat().st_size for file in files) - self.max_bytes
        for file in files:
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                excess -= file.stat().st_size
                file.unlink()
                self._saved.discard(bytes.fromhex(file.stem))


def hash_model(model: nn.Module) -> bytes:
    """Return a hash of all weights of a model, as they are in memory."""
    pieces: list[Tensor] = []
    total = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().view(-1)
        if flat.numel():
            pieces += flat.view(torch.uint8).split(PIECE_BYTES)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for digest in pool.map(lambda piece: hashlib.sha256(piece.cpu().numpy()).digest(), pieces):
            total.update(digest)
    return total.digest()


def _by_age(folders: list[Path]) -> list[Path]:
    """Return the pages in these folders, oldest first."""
    ages: list[tuple[int, Path]] = []
    for folder in folders:
        for file in folder.glob("*.page"):
            with suppress(FileNotFoundError):
                ages.append((file.stat().st_mtime_ns, file))
    return [file for _, file in sorted(ages)]
