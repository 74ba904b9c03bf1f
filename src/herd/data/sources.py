"""Reading a user's own text: files, folders, compressed files, JSON lines, and data sets of the Hugging Face hub.

Everything is read as a stream and checked as it comes: text is UTF-8 without NUL bytes, or the file is refused with its
name and the byte where it goes wrong. A binary file *named* by the user is an error; one met while walking a folder is
skipped and counted in a warning. Order never depends on the file system: folders are walked sorted by name.

A long file is cut at paragraph borders into parts, each with its own source name (``book.txt@0003``), so that even one
single file can be divided into training and held-out text.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import lzma
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import DataError

PART_CHARS = 1 << 16
"""Characters of one part of a long file: long enough to train long contexts, short enough to divide one book."""

MIN_PART_CHARS = 1000
FEW_FILES = 20
"""Below this many files the parts shrink, so that there are some fifty of them to divide."""

BLOCK_BYTES = 1 << 20
PACKED = (".zst", ".gz")
JSON_LINES = (".jsonl", ".ndjson")
TEXT_FIELDS = ("text", "content")

CODE_LANGUAGES = {
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp", ".cu": "cuda",
    ".js": "javascript", ".ts": "typescript", ".java": "java", ".go": "go", ".rs": "rust", ".rb": "ruby",
    ".sql": "sql", ".cs": "csharp", ".php": "php", ".swift": "swift", ".kt": "kotlin", ".scala": "scala", ".lua": "lua",
    ".sh": "shell",
}  # fmt: skip
"""File endings that are source code; every other text is prose of an unknown language, ``und``."""


class DataWarning(UserWarning):
    """Something of the user's data was left out; the message says what and how much."""


@dataclass(frozen=True)
class Document:
    """One text with its origin. ``source`` names the file; what follows ``#`` in it is a place inside that file.

    ``kind``: ``text``, ``code`` or ``parallel``. ``lang``: a language code (``en``), a programming language
    (``python``), or ``und`` where unknown.
    """

    text: str
    source: str
    kind: str = "text"
    lang: str = "und"

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text: the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))


class NotText(DataError):
    """A file that is not UTF-8 text."""


def read_path(path: Path | str) -> Iterator[Document]:
    """Every document of a file, or of all files below a folder. DataError where there is none."""
    root, files = Path(path), list_files(path)
    if root.is_file():
        yield from read_file(root, source=root.name, part_chars=part_chars(files))
        return
    size = part_chars(files)
    skipped: Counter[str] = Counter()
    found = False
    for file in files:
        if file.stat().st_size == 0:
            skipped["empty"] += 1
            continue
        try:
            for document in read_file(file, source=file.relative_to(root).as_posix(), part_chars=size):
                found = True
                yield document
        except NotText:
            # What was yielded before a late bad byte stays: a truncated download is mostly text.
            skipped["not UTF-8 text"] += 1
    if skipped:
        what = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))
        note = f"{root}: skipped {sum(skipped.values())} of {len(files)} files ({what})"
        warnings.warn(note, DataWarning, stacklevel=2)
    if not found:
        raise DataError(f"{root}: no text in any of its {len(files)} files; give a folder with UTF-8 text")


def list_files(path: Path | str) -> list[Path]:
    """Return the file itself, or all files below a folder sorted by name. DataError where the path does not exist."""
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; give a path that exists")
    return [root] if root.is_file() else sorted(_walk(root))


def part_chars(files: list[Path]) -> int:
    """How long a part of a file may be: `PART_CHARS`, or less where few files must still be divided."""
    if len(files) >= FEW_FILES:
        return PART_CHARS
    total = sum(file.stat().st_size for file in files)
    return min(PART_CHARS, max(MIN_PART_CHARS, total // 60))


def read_file(file: Path, *, source: str, part_chars: int = PART_CHARS) -> Iterator[Document]:
    """The documents of one file; ``source`` is the name they carry. NotText or DataError where it is unreadable."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    ending = suffixes[-1] if suffixes else ""
    try:
        with _open(file) as stream:
            if ending in JSON_LINES:
                yield from _json_lines(stream, str(file), source)
            else:
                yield from _parts(stream, str(file), source, ending, part_chars)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: cannot be read ({error}); check the file and its permissions") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "zstandard":
            raise DataError(f"{file}: broken zstd data ({error}); download it again") from None
        raise


def decode_stream(stream: BinaryIO, name: str) -> Iterator[str]:
    """Text of a byte stream, a block at a time; NotText names the byte where it is NUL or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        block = stream.read(BLOCK_BYTES)
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
            yield text.removeprefix("\ufeff") if offset == 0 else text
        if not block:
            return
        offset += len(block)


def cut(text: str, size: int) -> int:
    """Where to end a part of about ``size`` characters: at the last blank line, line end or space before it."""
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, size // 2, size)
        if end >= 0:
            return end + len(mark)
    return size


def _parts(stream: BinaryIO, name: str, source: str, ending: str, size: int) -> Iterator[Document]:
    kind, lang = ("code", CODE_LANGUAGES[ending]) if ending in CODE_LANGUAGES else ("text", "und")
    rest, number = "", 0
    for text in decode_stream(stream, name):
        rest += text
        start = 0
        while len(rest) - start > size:
            end = start + cut(rest[start : start + size], size)
            yield Document(rest[start:end], f"{source}@{number:04d}", kind, lang)
            start, number = end, number + 1
        rest = rest[start:]
    if rest.strip() or number == 0:
        if not rest.strip():
            raise DataError(f"{name}: empty file; give one with text")
        yield Document(rest, f"{source}@{number:04d}" if number else source, kind, lang)


def _json_lines(stream: BinaryIO, name: str, source: str) -> Iterator[Document]:
    line_number = 0
    for line_number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{name}: line {line_number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise NotText(
                f"{where}: not UTF-8 at byte {error.start} of the line; convert it to UTF-8"
            ) from None
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); one JSON object a line") from None
        yield row_document(row, where, f"{source}@{line_number:07d}")
    if line_number == 0:
        raise DataError(f"{name}: empty file; give one JSON object a line with a field 'text'")


def row_document(row: object, where: str, source: str) -> Document:
    """The document of one row of a data set: its ``text`` (or ``content``), and ``lang`` where it has one."""
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {type(row).__name__} instead of an object; give objects with a field 'text'"
        )
    text = next((row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str)), None)
    if text is None:
        raise DataError(
            f"{where}: no string 'text' among {sorted(map(str, row))[:8]}; rename the field to 'text'"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a surrogate pair at character {error.start}; repair the text"
        ) from None
    lang = row.get("lang") or row.get("language")
    return Document(text, source, "text", lang if isinstance(lang, str) else "und")


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _open(file: Path) -> BinaryIO:
    if file.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        zstandard = importlib.import_module("zstandard")
        # zstandard's reader stops silently at the end of a truncated frame; reading frame by frame does not.
        return io.BufferedReader(_ZstdReader(file, zstandard))  # type: ignore[arg-type,return-value]
    return open(file, "rb")


class _ZstdReader(io.RawIOBase):
    """All frames of a zstd file as bytes; a truncated last frame raises EOFError instead of looking like an end."""

    def __init__(self, file: Path, zstandard: Any) -> None:
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
