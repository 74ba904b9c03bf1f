"""Write a file of tensors with a known layout: the header, then the tensors in order, in chunks.

The position of each tensor follows from the shapes. So a file of any size needs only the memory of one chunk,
and a journal with the number of finished tensors is enough to continue after an interruption.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .journal import Journal

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
"""A function that is called with (bytes done, total bytes)."""
Advance = Callable[[int], None]
"""A function that is called with the number of bytes just written."""


def advance_of(progress: Progress | None, total: int) -> Advance:
    """Return a function that adds up bytes and reports the sum to ``progress``."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    return advance


def write_tensors(
    path: Path,
    header: bytes,
    sizes: Mapping[str, int],
    pieces_of: Callable[[str], Iterable[Tensor]],
    advance: Advance,
    *,
    n_written: int = 0,
    alignment: int = 1,
    journal: Journal | None = None,
) -> None:
    """Write ``header`` and the tensors, each padded to ``alignment``, to ``path``.

    ``pieces_of(name)`` yields a tensor's bytes (flat uint8) and is called once per tensor, in order. The
    first ``n_written`` tensors are in the file already. Raises `CheckpointError` if the chunks do not add up
    to ``sizes``.
    """

    def padding(nbytes: int) -> int:
        return -nbytes % alignment

    names = list(sizes)
    start = len(header) + padding(len(header))
    start += sum(sizes[name] + padding(sizes[name]) for name in names[:n_written])
    with path.open("r+b" if n_written else "wb") as out:
        if n_written:
            out.truncate(start)
            out.seek(start)
            advance(sum(sizes[name] for name in names[:n_written]))
        else:
            out.write(header + bytes(padding(len(header))))
        for name in names[n_written:]:
            written = 0
            for piece in pieces_of(name):
                flat = piece.contiguous().reshape(-1).numpy()
                written += out.write(memoryview(flat))  # type: ignore[arg-type]
                advance(piece.numel())
            if written != sizes[name]:
                raise CheckpointError(f"{path}: {name} has {written} bytes, its shape needs {sizes[name]}")
            out.write(bytes(padding(written)))
            if journal:
                journal.add(written, out)
        if journal:  # the journal may be saved for this file while the next one is written
            out.flush()
            os.fsync(out.fileno())
