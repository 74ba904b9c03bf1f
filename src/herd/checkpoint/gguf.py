"""Reading GGUF: everything is checked before anything is believed.

A GGUF file is a header (magic, version, counts), metadata (typed key-value pairs), a table of tensors (name,
dimensions, type, offset), and their bytes, each tensor beginning on a multiple of the alignment. Readers that trusted
these numbers have had heap overflows and leaks (CVE-2025-53630, CVE-2026-7482), so this one trusts none: every count
and length is compared with the bytes that are left before it is used, dimensions are multiplied as unbounded integers,
and tensors must lie one behind another within the file, as llama.cpp writes them and demands them. Python's integers
do not overflow, and the file is mapped, not read: it can claim what it likes, nothing is allocated for a claim.

Torch-free but for `GGUF.rows`, which gives a tensor's bytes without copying them.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..quant.formats import BY_CODE, Format

if TYPE_CHECKING:
    from torch import Tensor

FILE = "model.gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME = 63
"""Bytes of a tensor's name; llama.cpp has room for no more."""
MAX_KEY = 65_535
MAX_NESTING = 4
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Value types by number, as `struct` spells them: u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64."""
_SMALLEST = {STRING: 8, ARRAY: 12} | {code: struct.calcsize("<" + letter) for code, letter in SCALARS.items()}


@dataclass(frozen=True)
class Strings:
    """An array of texts as it lies in the file; decoded when asked for."""

    raw: list[bytes]

    def __len__(self) -> int:
        return len(self.raw)

    def decode(self) -> list[str]:
        return [text.decode("utf-8") for text in self.raw]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: ``shape`` with rows first (GGUF lists them last), ``start`` in the file, ``nbytes``."""

    name: str
    format: Format
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUF:
    """An open, checked file: ``metadata`` by key and ``tensors`` by name, in file order.

    Values are int, float, bool, str, a tuple of them, or `Strings`. Raises `CheckpointError`, with one line that names
    the file and what is wrong, for anything that is not a sound GGUF file. The mapping lives as long as tensors use it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise CheckpointError(
                        f"{path}: truncated or not GGUF: {self.size} bytes; fetch the file again"
                    )
                # private and writable, as torch wants its memory; nobody writes
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot read: {error.strerror or error}; fetch the file again"
            ) from error
        cursor = _Cursor(self._map, self.size, self.path)
        n_tensors, n_values = _header(cursor)
        self.metadata = _metadata(cursor, n_values)
        self.alignment = _alignment(self.metadata, self.path)
        table = _table(cursor, n_tensors)
        self.header_bytes = cursor.at
        self.tensors = _placed(table, cursor.at, self.alignment, self.size, self.path)

    def rows(self, name: str) -> Tensor:
        """A tensor's bytes as (rows, bytes of a row) uint8, lying in the mapped file; one dimension: one row."""
        import torch

        entry = self.tensors[name]
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        return flat.view(1 if len(entry.shape) == 1 else math.prod(entry.shape[:-1]), -1)

    def forget(self, name: str) -> None:
        """Tell the system that a tensor's pages are not needed soon, so that streaming a file does not fill memory."""
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            entry = self.tensors[name]
            start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (entry.start + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if stop > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value of type int, float, bool, str or `Strings` (tuple: an array of numbers); ``default`` if the
        key is absent. Raises `CheckpointError` for another type."""
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def require(self, key: str, kind: type) -> Any:
        """`get` of a key that must be there."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: {key} is missing; fetch the file again")
        return self.get(key, kind)


class _Cursor:
    """Reads forward; each step is compared with the bytes left."""

    def __init__(self, data: mmap.mmap, size: int, path: Path) -> None:
        self.data, self.size, self.path, self.at = data, size, path, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; fetch the file again")

    def take(self, letters: str, what: str) -> Any:
        """One number (or several) of little-endian `struct` letters."""
        length = struct.calcsize("<" + letters)
        self.require(length, what)
        values = struct.unpack_from("<" + letters, self.data, self.at)
        self.at += length
        return values[0] if len(letters) == 1 else values

    def text(self, what: str, limit: int | None = None) -> bytes:
        length = self.take("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.fail(f"corrupt: {what} has {length} bytes, at most {limit} are allowed")
        self.require(length, what)
        self.at += length
        return self.data[self.at - length : self.at]

    def require(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise self.fail(
                f"truncated or corrupt: {what} takes {nbytes} bytes at {self.at}, the file has {self.size}"
            )

    def count(self, number: int, smallest: int, what: str) -> int:
        """A number of items, of which each takes at least ``smallest`` bytes of what is left."""
        if number * smallest > self.size - self.at:
            raise self.fail(f"truncated or corrupt: {number} {what} do not fit in {self.size} bytes")
        return number


def _header(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.data[:4]
    if magic != MAGIC:
        raise cursor.fail(f"not GGUF: begins with {magic!r}")
    cursor.at = 4
    version = cursor.take("I", "the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{cursor.path}: big-endian GGUF is not read; convert it on its own machine"
            )
        raise CheckpointError(f"{cursor.path}: GGUF version {version} is not read; versions 2 and 3 are")
    n_tensors = cursor.take("Q", "the number of tensors")
    n_values = cursor.take("Q", "the number of metadata values")
    cursor.count(n_values, 8 + 4 + 1, "metadata values")
    cursor.count(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
    return n_tensors, n_values


def _metadata(cursor: _Cursor, n_values: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for index in range(n_values):
        key = _decoded(cursor, cursor.text(f"metadata key {index}", MAX_KEY), f"metadata key {index}")
        if not key or not key.isprintable():
            raise cursor.fail(f"corrupt: metadata key {index} is {key!r}")
        if key in out:
            raise cursor.fail(f"corrupt: metadata key {key} is there twice")
        out[key] = _value(cursor, cursor.take("I", f"the type of {key}"), key, 0)
    return out


def _value(cursor: _Cursor, code: int, key: str, depth: int) -> Any:
    if code == STRING:
        return _decoded(cursor, cursor.text(key), key)
    if code == ARRAY:
        return _array(cursor, key, depth)
    if code not in SCALARS:
        raise cursor.fail(f"corrupt: {key} has unknown value type {code}")
    value = cursor.take(SCALARS[code], key)
    if code == BOOL:
        if value > 1:
            raise cursor.fail(f"corrupt: {key} is a truth value of {value}")
        return bool(value)
    return value


def _array(cursor: _Cursor, key: str, depth: int) -> Any:
    code, length = cursor.take("I", f"the type of {key}"), cursor.take("Q", f"the length of {key}")
    if code not in _SMALLEST:
        raise cursor.fail(f"corrupt: {key} is an array of unknown type {code}")
    cursor.count(length, _SMALLEST[code], f"elements of {key}")
    if code == STRING:
        return Strings(_texts(cursor, length, key))
    if code == ARRAY:
        if depth + 1 >= MAX_NESTING:
            raise cursor.fail(f"corrupt: {key} is an array nested deeper than {MAX_NESTING}")
        return tuple(_array(cursor, key, depth + 1) for _ in range(length))
    letters = f"<{length}{SCALARS[code]}"
    values = struct.unpack_from(letters, cursor.data, cursor.at)
    cursor.at += struct.calcsize(letters)
    if code == BOOL and any(value > 1 for value in values):
        raise cursor.fail(f"corrupt: {key} holds truth values other than 0 and 1")
    return tuple(map(bool, values)) if code == BOOL else values


def _texts(cursor: _Cursor, length: int, key: str) -> list[bytes]:
    """Many texts quickly: a vocabulary has a hundred thousand and its merges twice that."""
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
        raise cursor.fail(
            f"truncated or corrupt: text {len(out)} of {key} reaches beyond the file's {size} bytes"
        )
    cursor.at = at
    return out


def _decoded(cursor: _Cursor, raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise cursor.fail(f"corrupt: {what} is not UTF-8") from error


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise CheckpointError(
            f"{path}: general.alignment={value!r} is not a power of two; fetch the file again"
        )
    return value


def _table(cursor: _Cursor, n_tensors: int) -> list[TensorEntry]:
    """The tensors as the table lists them: their starts are counted from the end of the header."""
    rows: list[TensorEntry] = []
    seen: set[str] = set()
    for index in range(n_tensors):
        name = _decoded(
            cursor, cursor.text(f"the name of tensor {index}", MAX_NAME), f"the name of tensor {index}"
        )
        if not name or not name.isprintable():
            raise cursor.fail(f"corrupt: tensor {index} has the name {name!r}")
        if name in seen:
            raise cursor.fail(f"corrupt: tensor {name} is there twice")
        seen.add(name)
        rows.append(_row(cursor, name))
    return rows


def _row(cursor: _Cursor, name: str) -> TensorEntry:
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


def _placed(
    rows: list[TensorEntry], header_bytes: int, alignment: int, size: int, path: Path
) -> dict[str, TensorEntry]:
    """Where the tensors lie: one behind another, padded to the alignment, and nothing after the last."""
    data = _aligned(header_bytes, alignment)
    end, before = data, "the header"
    out: dict[str, TensorEntry] = {}
    for row in rows:
        start = data + row.start
        if start != _aligned(end, alignment):
            what = "overlaps" if start < end else "does not follow"
            raise CheckpointError(
                f"{path}: corrupt: {row.name} at {start} {what} {before}; fetch the file again"
            )
        end, before = start + row.nbytes, row.name
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: {row.name} ends at {end}, the file has {size} bytes; fetch the file again"
            )
        out[row.name] = replace(row, start=start)
    if rows and size > _aligned(end, alignment):
        raise CheckpointError(
            f"{path}: corrupt: {size - end} bytes follow the last tensor; fetch the file again"
        )
    return out


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
