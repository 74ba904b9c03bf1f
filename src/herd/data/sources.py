"""Read documents from a user's files: text, code, and the ``text`` of JSON, CSV and Parquet rows.

An unreadable file is an error if the user named it. In a folder it is skipped and counted in a warning. The
order never depends on the file system: folders are walked sorted by name.

A long file is split at ends of paragraphs into parts, each with a source name of its own (``book.txt@0003``),
so that even a single file can be divided into training and held-out text.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .rows import JSON_LINES, ROW_ENDINGS, DataRow, NoRows, read_rows
from .text_files import DataWarning, NotText, decode_blocks, file_ending, list_files, open_bytes

PART_CHARS = 1 << 16
"""Characters in a part of a long file: enough to train long contexts, few enough to divide one book."""

MIN_PART_CHARS = 1000
FEW_FILES = 20
"""Number of files below which parts are shorter, so that there are about `WANTED_PARTS` of them."""
WANTED_PARTS = 60

TEXT_FIELDS = ("text", "content")

CODE_LANGUAGES = {
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp",
    ".cu": "cuda", ".js": "javascript", ".ts": "typescript", ".java": "java", ".go": "go", ".rs": "rust",
    ".rb": "ruby", ".sql": "sql", ".cs": "csharp", ".php": "php", ".swift": "swift", ".kt": "kotlin",
    ".scala": "scala", ".lua": "lua", ".sh": "shell",
}  # fmt: skip
"""File endings of source code. Every other text is prose of an unknown language, ``und``."""


@dataclass(frozen=True)
class Document:
    """A text with its origin.

    ``source`` is the name of the file, and after a ``#`` a position in it. ``kind`` is ``text``, ``code`` or
    ``parallel``. ``lang`` is a language code (``en``), a programming language (``python``), or ``und`` if
    unknown.
    """

    text: str
    source: str
    kind: str = "text"
    lang: str = "und"

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text, the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))


def read_path(root: Path, part_size: int | None = None) -> Iterator[Document]:
    """Yield every document of a file or folder, in parts of about ``part_size`` characters.

    None: the size of `part_chars`. Raises DataError if there is no document.
    """
    files = list_files(root)
    size = part_chars(files) if part_size is None else part_size
    if root.is_file():
        yield from read_file(root, source=root.name, part_chars=size)
        return
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
        except NotText as error:
            # documents before the bad byte stay in the corpus: a truncated download is mostly text
            skipped[error.why] += 1
    if skipped:
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))
        note = f"{root}: skipped {sum(skipped.values())} of {len(files)} files ({reasons})"
        warnings.warn(note, DataWarning, stacklevel=2)
    if not found:
        raise DataError(f"{root}: no text in any of its {len(files)} files; give a folder with UTF-8 text")


def part_chars(files: list[Path]) -> int:
    """Return the number of characters in a part of a file: `PART_CHARS`, or fewer if there are few files."""
    if len(files) >= FEW_FILES:
        return PART_CHARS
    total = sum(file.stat().st_size for file in files)
    return min(PART_CHARS, max(MIN_PART_CHARS, total // WANTED_PARTS))


def read_file(file: Path, *, source: str, part_chars: int = PART_CHARS) -> Iterator[Document]:
    """Yield the documents of a file, named after ``source``. Raises NotText or DataError if unreadable."""
    ending = file_ending(file)
    if ending in ROW_ENDINGS:
        for number, row in enumerate(read_rows(file, str(file))):
            try:
                yield row_document(row, f"{source}@{row.number:07d}")
            except DataError as error:
                if number == 0 and ending not in JSON_LINES:  # a settings file, a table of numbers, ...
                    raise NoRows(str(error)) from None
                raise
        return
    with open_bytes(file) as stream:
        yield from _parts(decode_blocks(stream, str(file)), str(file), source, ending, part_chars)


def part_end(text: str, size: int) -> int:
    """Return the end of a part of about ``size`` characters: after a blank line, line end or space."""
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, size // 2, size)
        if end >= 0:
            return end + len(mark)
    return size


def _parts(blocks: Iterator[str], name: str, source: str, ending: str, size: int) -> Iterator[Document]:
    kind, lang = ("code", CODE_LANGUAGES[ending]) if ending in CODE_LANGUAGES else ("text", "und")
    rest, number = "", 0
    for text in blocks:
        if not rest and number == 0 and _is_json(text):
            note = f"{name}: is JSON and is read as running text; name it .json or .jsonl to read its rows"
            warnings.warn(note, DataWarning, stacklevel=4)
        rest += text
        start = 0
        while len(rest) - start > size:
            end = start + part_end(rest[start : start + size], size)
            yield Document(rest[start:end], f"{source}@{number:04d}", kind, lang)
            start, number = end, number + 1
        rest = rest[start:]
    if rest.strip():
        yield Document(rest, f"{source}@{number:04d}" if number else source, kind, lang)
    elif number == 0:
        raise DataError(f"{name}: empty file; give one with text")


def _is_json(text: str) -> bool:
    """Return whether a text, or its first line, is a JSON object or a list of objects."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    for part in (text.lstrip().partition("\n")[0], text):
        with suppress(ValueError, RecursionError):
            value = json.loads(part)
            return isinstance(value[0] if isinstance(value, list) and value else value, dict)
    return False


def row_document(row: DataRow, source: str) -> Document:
    """Return the document of a row: a string, or an object with ``text`` or ``content``, maybe ``lang``."""
    fields = {"text": row.value} if isinstance(row.value, str) else row.value
    if not isinstance(fields, dict):
        raise DataError(
            f"{row.where}: {type(fields).__name__} instead of an object; give objects with a field 'text'"
        )
    text = next((fields[field] for field in TEXT_FIELDS if isinstance(fields.get(field), str)), None)
    if text is None:
        cure = "rename the field to 'text'"
        if "messages" in fields or "conversations" in fields:
            cure = "these are dialogs (--dialogs of herd shrink, data.kind: dialogs in a recipe)"
        raise DataError(f"{row.where}: no string 'text' among {sorted(map(str, fields))[:8]}; {cure}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: half a surrogate pair at character {error.start}; repair the text"
        ) from None
    lang = fields.get("lang") or fields.get("language")
    return Document(text, source, "text", lang if isinstance(lang, str) else "und")
