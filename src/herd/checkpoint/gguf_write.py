"""Writing GGUF: the header first, from shapes alone, then the tensors as they come, a few rows at a time.

The memory needed is that of the rows in hand, so an embedding of 128,256 rows passes through in pieces. Whoever calls
sees to it that the file appears whole or not at all (`atomic.whole_folder`, `journal.resumable_file`).
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..quant.formats import Format
from .gguf import ARRAY, DEFAULT_ALIGNMENT, MAGIC, STRING
from .journal import Journal
from .weights import Progress

Value = tuple[str, str, Any]
"""(key, type, value): the type a `struct` letter, "?" for a truth value, "s" for text, or "[" and one of these."""
Plan = Mapping[str, tuple[tuple[int, ...], Format]]
"""Shape (rows first) and format of each tensor by its name in the file, in order."""

_CODES = {
    "B": 0,
    "b": 1,
    "H": 2,
    "h": 3,
    "I": 4,
    "i": 5,
    "f": 6,
    "?": 7,
    "s": STRING,
    "Q": 10,
    "q": 11,
    "d": 12,
}
HASH_PIECE = 64 << 20


def write_gguf(
    path: Path,
    metadata: Iterable[Value],
    plan: Plan,
    get: Callable[[str], Iterable[Tensor]],
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Writes ``path``; ``get(name)`` gives a tensor's bytes (uint8) in pieces, once, in order.

    What a ``journal`` says is done is kept and not asked for again. Raises `CheckpointError` for pieces that do not
    add up, and passes on what ``get`` raises; OSError from the disk.
    """
    sizes = {
        name: math.prod(shape) // format.block * format.block_bytes for name, (shape, format) in plan.items()
    }
    header = _header(list(metadata), plan, sizes)
    if journal and journal.done and not _begins_with(path, header):  # another tokenizer, say
        journal.restart()
    known = list(sizes)[: journal.done if journal else 0]
    total, done = sum(sizes.values()), sum(sizes[name] for name in known)
    with path.open("r+b" if known else "wb") as out:
        if known:
            out.truncate(_aligned(len(header)) + sum(_aligned(sizes[name]) for name in known))
            out.seek(0, os.SEEK_END)
        else:
            out.write(header)
            _pad(out)
        for name in list(sizes)[len(known) :]:
            written = 0
            for piece in get(name):
                written += out.write(memoryview(piece.contiguous().reshape(-1).numpy()))  # type: ignore[arg-type]
                if progress:
                    progress(done + written, total)
            if written != sizes[name]:
                raise CheckpointError(
                    f"{path}: {name} came as {written} bytes, its shape and type take {sizes[name]}"
                )
            done += written
            _pad(out)
            if journal:
                journal.add(written, out)


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """sha256 over the sha256 of each 64 MiB of a file: as safe as one, and taken on several cores."""
    size = path.stat().st_size
    starts = range(0, size, HASH_PIECE)
    digests: list[bytes] = []
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for index, digest in enumerate(pool.map(lambda start: _hash_piece(path, start), starts)):
            digests.append(digest)
            if progress:
                progress(min(size, (index + 1) * HASH_PIECE), size)
    return hashlib.sha256(b"gguf" + b"".join(digests)).hexdigest()


def _hash_piece(path: Path, start: int) -> bytes:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = HASH_PIECE
        while left and (data := file.read(min(left, 1 << 20))):
            sha.update(data)
            left -= len(data)
    return sha.digest()


def _header(metadata: Sequence[Value], plan: Plan, sizes: Mapping[str, int]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(plan), len(metadata))]
    for key, letter, value in metadata:
        parts.append(_text(key))
        if letter.startswith("["):
            parts.append(struct.pack("<IIQ", ARRAY, _CODES[letter[1:]], len(value)))
            parts += [_value(letter[1:], item) for item in value]
        else:
            parts.append(struct.pack("<I", _CODES[letter]))
            parts.append(_value(letter, value))
    offset = 0
    for name, (shape, format) in plan.items():
        parts.append(_text(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), format.code, offset))
        offset += _aligned(sizes[name])
    return b"".join(parts)


def _value(letter: str, value: Any) -> bytes:
    return _text(value) if letter == "s" else struct.pack("<" + letter, value)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _begins_with(path: Path, header: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False


def _aligned(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _pad(out: Any) -> None:
    out.write(b"\0" * (-out.tell() % DEFAULT_ALIGNMENT))
