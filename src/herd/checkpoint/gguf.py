"""Read GGUF files. Everything is checked before it is used.

A GGUF file is a header (magic, version, counts), metadata (typed key-value pairs), a table of tensors (name,
dimensions, type, offset), and their bytes. Each tensor starts at a multiple of the alignment. Readers that
trusted these numbers have had heap overflows and leaks (CVE-2025-53630, CVE-2026-7482). So this reader trusts
none, unlike the reader of the gguf package: every count and length is compared with the remaining bytes
before it is used, dimensions are multiplied as unbounded integers, and tensors must follow one another within
the file, as llama.cpp requires. The file is mapped and not read, so a file's claims allocate no memory.

A model may be split into files named ``NAME-00001-of-00003.gguf``. Opening the first one opens the others
too.

Only `GGUF.rows` needs torch. It returns a tensor's bytes without copying them.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..quant.formats import BY_CODE, Format

if TYPE_CHECKING:
    from torch import Tensor

FILE = "model.gguf"
EMBEDDING = "token_embd.weight"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME = 63
"""Longest name of a tensor in bytes, a limit of llama.cpp."""
MAX_KEY = 65_535
MAX_NESTING = 4
MAX_PARTS = 10_000
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Formats of value types by number, in `struct`'s letters: u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64."""
_SMALLEST = {STRING: 8, ARRAY: 12} | {code: struct.calcsize("<" + letter) for code, letter in SCALARS.items()}
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Strings:
    """An array of texts as stored bytes, decoded on request."""

    raw: list[bytes]

    def __len__(self) -> int:
        return len(self.raw)

    def decode(self) -> list[str]:
        return [text.decode("utf-8") for text in self.raw]


@dataclass(frozen=True)
class TensorEntry:
    """An entry of the table of tensors.

    ``shape`` has rows first (GGUF has them last), ``start`` is in bytes.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUF:
    """An open, checked file with ``metadata`` by key and ``tensors`` by name, in file order.

    Values are int, float, bool, str, a tuple of them, or `Strings`. Raises `CheckpointError`, with one line
    that names the file and the fault, if it is not a valid GGUF file. The mapping exists as long as tensors
    use it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise CheckpointError(
                        f"{path}: truncated or not GGUF ({self.size} bytes); fetch it again"
                    )
                # Private and writable, because torch requires writable memory. It is never written.
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot read: {error.strerror or error}; fetch it again"
            ) from error
        cursor = _Cursor(self._map, self.size, self.path)
        n_tensors, n_values = _read_header(cursor)
        self.metadata = _read_metadata(cursor, n_values)
        self.alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(self.alignment) is not int or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise cursor.fail(f"general.alignment={self.alignment!r} is not a power of two")
        table = _read_table(cursor, n_tensors)
        self.header_bytes = cursor.at
        self.tensors = _placed(table, cursor, self.alignment)
        self._part_of: dict[str, GGUF] = {}
        self._open_other_parts()

    @property
    def is_split(self) -> bool:
        """Whether the tensors are in several files."""
        return bool(self._part_of)

    def rows(self, name: str) -> Tensor:
        """Return a tensor's bytes mapped from the file: (rows, bytes per row) uint8. A vector is one row."""
        if name in self._part_of:
            return self._part_of[name].rows(name)
        import torch

        entry = self.tensors[name]
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        return flat.view(1 if len(entry.shape) == 1 else math.prod(entry.shape[:-1]), -1)

    def forget(self, name: str) -> None:
        """Release a tensor's memory pages, so that streaming a file does not fill memory."""
        if name in self._part_of:
            self._part_of[name].forget(name)
        elif hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            entry = self.tensors[name]
            start = _aligned(entry.start, mmap.PAGESIZE)
            stop = (entry.start + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if stop > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value of type int, float, bool, str, tuple (an array of numbers) or `Strings`.

        Returns ``default`` if the key is absent. Raises `CheckpointError` for another type.
        """
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def require(self, key: str, kind: type) -> Any:
        """Return the value of a key as `get` does. Raises `CheckpointError` if it is absent."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: {key} is missing; fetch the file again")
        return self.get(key, kind)

    def _open_other_parts(self) -> None:
        count, number = self.get("split.count", int, 1), self.get("split.no", int, 0)
        named = _PART.fullmatch(self.path.name)
        if count <= 1 or number > 0:
            return
        if named is None or int(named[2]) != 1 or int(named[3]) != count or count > MAX_PARTS:
            raise CheckpointError(
                f"{self.path}: is part 1 of {count}; keep the names NAME-00001-of-{count:05}.gguf, do not "
                "join the parts with cat (llama-gguf-split --merge joins them)"
            )
        for part, path in enumerate(gguf_parts(self.path)[1:], 2):
            if not path.exists():
                raise CheckpointError(f"{self.path}: part {path.name} is missing; put it there")
            other = GGUF(path)
            twice = self.tensors.keys() & other.tensors.keys()
            if other.get("split.no", int, -1) != part - 1 or twice:
                raise CheckpointError(f"{path}: is not part {part} of {self.path.name}; fetch it again")
            self.tensors |= other.tensors
            self._part_of |= dict.fromkeys(other.tensors, other)
            self.size += other.size


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file with a checkpoint's weights (the first part if it is split), or None.

    ``path`` is the file, any of its parts, or a folder. A folder must have ``model.gguf``, as Herd writes it,
    or a single GGUF file and no other weights. Raises `CheckpointError` if several files could be meant.
    """
    if not path.is_dir():
        return gguf_parts(path)[0]
    plain = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    if (path / FILE).exists():
        if others := [*plain, *path.glob("config.json")]:
            raise CheckpointError(f"{path}: has both {FILE} and {others[0].name}; delete the stale one")
        return path / FILE
    files = {} if plain else {gguf_parts(file)[0]: file for file in sorted(path.glob("*.gguf"))}
    models = [file for file in files if not file.name.startswith("mmproj")]  # mmproj files are image encoders
    if len(models) > 1:
        names = ", ".join(file.name for file in models[:3])
        raise CheckpointError(f"{path}: holds several GGUF files ({names}); name one: {models[0]}")
    return models[0] if models else None


def gguf_parts(path: Path) -> list[Path]:
    """Return the paths of all parts of the split file that ``path`` belongs to, or only ``path``."""
    named = _PART.fullmatch(path.name)
    if named is None or not 1 <= int(named[2]) <= int(named[3]) <= MAX_PARTS:
        return [path]
    count = int(named[3])
    return [path.with_name(f"{named[1]}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]


class _Cursor:
    """A reading position in the file. Each step is checked against the remaining bytes."""

    def __init__(self, data: mmap.mmap, size: int, path: Path) -> None:
        self.data, self.size, self.path, self.at = data, size, path, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; fetch the file again")

    def take(self, letters: str, what: str) -> Any:
        """Read one number or several, in little-endian `struct` format."""
        length = struct.calcsize("<" + letters)
        self.require(length, what)
        values = struct.unpack_from("<" + letters, self.data, self.at)
        self.at += length
        return values[0] if len(letters) == 1 else values

    def raw_text(self, what: str, limit: int | None = None) -> bytes:
        length = self.take("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.fail(f"corrupt: {what} has {length} bytes, at most {limit} are allowed")
        self.require(length, what)
        self.at += length
        return self.data[self.at - length : self.at]

    def text(self, what: str, limit: int | None = None) -> str:
        try:
            return self.raw_text(what, limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"corrupt: {what} is not UTF-8") from error

    def name(self, what: str, limit: int) -> str:
        """Read a text that must be printable and not empty."""
        name = self.text(what, limit)
        if not name or not name.isprintable():
            raise self.fail(f"corrupt: {what} is {name!r}")
        return name

    def require(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise self.fail(
                f"truncated or corrupt: {what} takes {nbytes} bytes at {self.at}, the file has {self.size}"
            )

    def require_count(self, number: int, smallest: int, what: str) -> None:
        """Check a number of items that take at least ``smallest`` bytes each against the remaining bytes."""
        if number * smallest > self.size - self.at:
            raise self.fail(f"truncated or corrupt: {number} {what} do not fit in {self.size} bytes")


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata values."""
    magic = cursor.data[:4]
    if magic != MAGIC:
        if cursor.data[:19] == b"version https://git":
            raise CheckpointError(f"{cursor.path}: is a git-lfs pointer, not the weights; run: git lfs pull")
        raise cursor.fail(f"not GGUF: begins with {magic!r}")
    cursor.at = 4
    version = cursor.take("I", "the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{cursor.path}: big-endian GGUF is not read; convert it first")
        raise CheckpointError(f"{cursor.path}: GGUF version {version} is not read; versions 2 and 3 are")
    n_tensors = cursor.take("Q", "the number of tensors")
    n_values = cursor.take("Q", "the number of metadata values")
    cursor.require_count(n_values, 8 + 4 + 1, "metadata values")
    cursor.require_count(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
    return n_tensors, n_values


def _read_metadata(cursor: _Cursor, n_values: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for index in range(n_values):
        key = cursor.name(f"metadata key {index}", MAX_KEY)
        if key in out:
            raise cursor.fail(f"corrupt: metadata key {key} is there twice")
        out[key] = _read_value(cursor, cursor.take("I", f"the type of {key}"), key, 0)
    return out


def _read_value(cursor: _Cursor, code: int, key: str, depth: int) -> Any:
    if code == STRING:
        return cursor.text(key)
    if code == ARRAY:
        return _read_array(cursor, key, depth)
    if code not in SCALARS:
        raise cursor.fail(f"corrupt: {key} has unknown value type {code}")
    value = cursor.take(SCALARS[code], key)
    if code == BOOL and value > 1:
        raise cursor.fail(f"corrupt: {key} is a truth value of {value}")
    return bool(value) if code == BOOL else value


def _read_array(cursor: _Cursor, key: str, depth: int) -> Any:
    code, length = cursor.take("I", f"the type of {key}"), cursor.take("Q", f"the length of {key}")
    if code not in _SMALLEST:
        raise cursor.fail(f"corrupt: {key} is an array of unknown type {code}")
    cursor.require_count(length, _SMALLEST[code], f"elements of {key}")
    if code == STRING:
        return Strings(_read_texts(cursor, length, key))
    if code == ARRAY:
        if depth + 1 >= MAX_NESTING:
            raise cursor.fail(f"corrupt: {key} is an array nested deeper than {MAX_NESTING}")
        return tuple(_read_array(cursor, key, depth + 1) for _ in range(length))
    letters = f"<{length}{SCALARS[code]}"
    values = struct.unpack_from(letters, cursor.data, cursor.at)
    cursor.at += struct.calcsize(letters)
    if code == BOOL and any(value > 1 for value in values):
        raise cursor.fail(f"corrupt: {key} holds truth values other than 0 and 1")
    return tuple(map(bool, values)) if code == BOOL else values


def _read_texts(cursor: _Cursor, length: int, key: str) -> list[bytes]:
    """Read many texts in a fast loop: a vocabulary has 100,000 tokens, and twice as many merges."""
    data, size, at = cursor.data, cursor.size, cursor.at
    unpack = struct.Struct("<Q").unpack_from
    out: list[bytes] = []
    for _ in range(length):
        stop = at + 8
        if stop > size:
            break
        stop += unpack(data, at)[0]
        if stop > size:
            break
        out.append(data[at + 8 : stop])
        at = stop
    if len(out) < length:
        raise cursor.fail(f"truncated or corrupt: text {len(out)} of {key} is beyond the file's {size} bytes")
    cursor.at = at
    return out


def _read_table(cursor: _Cursor, n_tensors: int) -> list[TensorEntry]:
    """Return the tensors in the order of the table. Their starts are relative to the end of the header."""
    entries: dict[str, TensorEntry] = {}
    for index in range(n_tensors):
        name = cursor.name(f"the name of tensor {index}", MAX_NAME)
        if name in entries:
            raise cursor.fail(f"corrupt: tensor {name} is there twice")
        entries[name] = _read_entry(cursor, name)
    return list(entries.values())


def _read_entry(cursor: _Cursor, name: str) -> TensorEntry:
    n_dims = cursor.take("I", f"{name}: the number of dimensions")
    if not 1 <= n_dims <= 4:
        raise cursor.fail(f"corrupt: {name} has {n_dims} dimensions; 1 to 4 are possible")
    shape = tuple(cursor.take("Q", f"{name}: a dimension") for _ in range(n_dims))[::-1]
    code, offset = cursor.take("I", f"{name}: the type"), cursor.take("Q", f"{name}: the offset")
    if code not in BY_CODE:
        raise CheckpointError(f"{cursor.path}: {name} has unknown type {code}; a newer llamaherd may know it")
    format = BY_CODE[code]
    if min(shape) < 1 or shape[-1] % format.block:
        raise cursor.fail(f"corrupt: {name} of shape {list(shape)} does not divide into {format.name} blocks")
    nbytes = math.prod(shape) // format.block * format.block_bytes
    if nbytes > cursor.size:
        raise cursor.fail(
            f"corrupt: {name} of shape {list(shape)} takes {nbytes} bytes, the file has {cursor.size}"
        )
    return TensorEntry(name, format, shape, offset, nbytes)


def _placed(table: list[TensorEntry], cursor: _Cursor, alignment: int) -> dict[str, TensorEntry]:
    """Return the tensors with their starts in the file.

    They must be aligned and contiguous, up to its end.
    """
    data = _aligned(cursor.at, alignment)
    end, before = data, "the header"
    out: dict[str, TensorEntry] = {}
    for entry in table:
        start = data + entry.start
        if start != _aligned(end, alignment):
            what = "overlaps" if start < end else "does not follow"
            raise cursor.fail(f"corrupt: {entry.name} at {start} {what} {before}")
        end, before = start + entry.nbytes, entry.name
        if end > cursor.size:
            raise cursor.fail(f"truncated: {entry.name} ends at {end}, the file has {cursor.size} bytes")
        out[entry.name] = replace(entry, start=start)
    if table and cursor.size > _aligned(end, alignment):
        after = _aligned(end, alignment)
        tail = cursor.data[after : after + 4]
        joined = "; parts of a split file are not joined by cat: keep them apart" if tail == MAGIC else ""
        raise cursor.fail(f"corrupt: {cursor.size - end} bytes follow the last tensor{joined}")
    return out


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
