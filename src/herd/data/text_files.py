"""Find and open a user's files: paths, patterns and folders, compressed files, UTF-8 text.

Text must be UTF-8, with or without a byte order mark, and without NUL bytes. Anything else is refused with
the file's name and the position of the bad byte. Files that end in .gz, .zst, .bz2 or .xz, or begin like gzip
and zstd files, are decompressed while they are read.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import importlib
import io
import lzma
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

BLOCK_BYTES = 1 << 20
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


class DataWarning(UserWarning):
    """A notice that a part of the user's data was left out or converted. It names the part and its size."""


class NotText(DataError):
    """A file that is not UTF-8 text: an error if the user named it, skipped in a folder."""

    why = "not UTF-8 text"


def expand_paths(name: Path | str) -> list[Path]:
    """Return the path of a name, or all paths that match it as a pattern, sorted.

    ``~`` is the home folder, and ``*``, ``?``, ``[..]`` and ``**`` match names. Raises DataError if nothing
    exists.
    """
    if not str(name):
        raise DataError("an empty path is given; write . for the folder itself")
    path = Path(os.path.expanduser(name))
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder; give a path that exists")
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{path}: no file or folder matches this pattern; give a path that exists")
    return found


def list_files(root: Path) -> list[Path]:
    """Return the file itself, or all files below a folder sorted by name, linked folders included.

    Names that begin with a dot and ``__pycache__`` are left out. A folder that is reached twice is listed
    once.
    """
    return [root] if root.is_file() else sorted(_walk(root))


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            file = Path(folder, name)
            if name.startswith("."):
                continue
            if file.is_file():
                yield file
            elif file.is_symlink():
                warnings.warn(f"{file}: skipped, it is a link to nothing", DataWarning, stacklevel=3)


def file_ending(file: Path | str) -> str:
    """Return the ending of a file's name in lower case, ``.jsonl`` for ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading its (decompressed) bytes. Raises DataError if it cannot be opened or read."""
    try:
        with _open(file) as stream:
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file}: cannot be read ({reason}); check the file and its permissions") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "zstandard":
            raise DataError(f"{file}: broken zstd data ({error}); download it again") from None
        raise


def decode_blocks(stream: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a byte stream in blocks. Raises NotText for a NUL byte and for bytes not in UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True
    while True:
        block = stream.read(BLOCK_BYTES)
        if offset == 0 and (
            other := next((OTHER_MARKS[m] for m in OTHER_MARKS if block.startswith(m)), None)
        ):
            raise NotText(f"{name}: {other}, not UTF-8 at byte 0; convert it to UTF-8")
        nul = block.find(b"\0")
        if nul >= 0:
            raise NotText(f"{name}: binary file, NUL at byte {offset + nul}; give UTF-8 text")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            bad = offset - pending + error.start
            raise NotText(f"{name}: not UTF-8 at byte {bad}; convert it to UTF-8") from None
        if text:
            yield text.removeprefix("\ufeff") if first else text
            first = False
        if not block:
            return
        offset += len(block)


def decode_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 byte stream with their line ends (see `decode_blocks`)."""
    rest = ""
    for text in decode_blocks(stream, name):
        *lines, rest = (rest + text).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def _open(file: Path) -> BinaryIO:
    ending = file.suffix.lower()
    if ending not in COMPRESSED:
        with open(file, "rb") as stream:
            begin = stream.read(4)
        ending = next((MAGIC[mark] for mark in MAGIC if begin.startswith(mark)), "")
    if ending == ".zst":
        # zstandard's own reader would stop silently in a truncated frame
        return io.BufferedReader(_ZstdReader(file))  # type: ignore[arg-type,return-value]
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(ending, open)(file, "rb")


class _ZstdReader(io.RawIOBase):
    """The bytes of all frames of a zstd file. A truncated last frame raises EOFError."""

    def __init__(self, file: Path) -> None:
        zstandard = importlib.import_module("zstandard")
        self._file = open(file, "rb")  # noqa: SIM115 -- closed with the reader
        self._new = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._frame: Any = None
        self._rest, self._out = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._rest or self._file.read(BLOCK_BYTES // 8)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("truncated zstd file")
                return 0
            if self._frame is None:
                self._frame = self._new()
            self._out = self._frame.decompress(data)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._out))
        buffer[:n] = self._out[:n]
        self._out = self._out[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
