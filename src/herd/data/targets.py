"""Store a teacher's sampled predictions with the rows they belong to, and stream both to a student.

A folder contains ``targets.json`` (what was labelled, by whom, with which tokenizer) and ``shard-00000.bin``
… A shard is a sequence of blocks, and a block is what the teacher read in one forward: a header, the rows
themselves, the entropy of every prediction and, for every trained token, the distinct words that were drawn
from the teacher's distribution with the number of draws and the log-probability of each. A block is
compressed. With 50 draws that is about 75 bytes per token, and a distribution over 49,152 words would take
96 KiB.

Everything is checked: the description has its own checksum, each block a CRC-32 that is compared whenever the
block is read. A shard that is being written ends in ``.part``. Its whole blocks are kept when the writer
dies. As the rows are stored too, a student needs neither the text nor the teacher, and one folder serves many
students.

Shapes: B rows of a block, T = context, E entries of a block (words that were drawn), J most of them per
token.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import zstandard

from ..errors import DataError
from ..files import write_json
from .batch import Batch
from .shards import digest_of
from .shuffle import epoch_row
from .stream import check_range

FORMAT = "herd-targets-1"
INDEX = "targets.json"
MAGIC = b"HRDT"
HEADER = struct.Struct("<4sIIIII")
"""Of a block: magic, number of its first row, rows, entries, bytes that follow, their CRC-32."""
MAX_DRAWS = 255
ROW_ARRAYS = ("tokens", "targets", "documents", "entropy", "n_words")
ENTRY_ARRAYS = ("ids", "counts", "log_p")
"""The arrays of a block: those with a value for every token, and those with a value for every entry."""
_CURE = "remove the folder and label again"


@dataclass(frozen=True)
class TargetsSpec:
    """The description of a folder of targets, which must agree before they are used or continued.

    ``vocab_size`` is the student's vocabulary. ``tokenizer``, ``data`` and ``teacher`` are hashes.
    """

    tokenizer: str
    data: str
    teacher: str
    vocab_size: int
    context: int
    n_rows: int
    n_draws: int = 50
    seed: int = 0
    block_rows: int = 4
    shard_rows: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.n_draws <= MAX_DRAWS:
            raise DataError(f"targets: n_draws={self.n_draws} must be between 1 and {MAX_DRAWS}")
        if self.n_rows < 1 or self.context < 1:
            raise DataError(f"targets: {self.n_rows} rows of {self.context} tokens; both must be at least 1")
        if self.shard_rows % self.block_rows:
            raise DataError(
                f"targets: {self.block_rows}-row blocks do not divide shards of {self.shard_rows} rows"
            )

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_rows)

    def rows_of_shard(self, number: int) -> range:
        """Return the rows of one shard."""
        start = number * self.shard_rows
        return range(start, min(start + self.shard_rows, self.n_rows))

    def require(self, folder: Path, other: TargetsSpec) -> None:
        """Raise `DataError` naming the first field in which ``other`` differs."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                shown = [value[:12] if isinstance(value, str) else value for value in (ours, theirs)]
                raise DataError(
                    f"{folder}: was labelled with {field.name} {shown[0]}, not {shown[1]}: "
                    f"choose another folder, or {_CURE}"
                )


@dataclass(frozen=True)
class TargetBlock:
    """Rows and the teacher's draws for them.

    Rows are (B, T) arrays: ``tokens``, ``targets`` (-100: not trained), ``documents``, ``entropy`` in nats
    and ``n_words``, the number of distinct words drawn for each token. The entries of all tokens, in order,
    are ``ids``, ``counts`` and ``log_p``, each (E,).
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    entropy: np.ndarray
    n_words: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    log_p: np.ndarray

    @staticmethod
    def dtypes(spec: TargetsSpec) -> dict[str, str]:
        """Return the dtype of each array on disk, in the order of the file."""
        word = "<u2" if spec.vocab_size <= 1 << 16 else "<u4"
        rows = {"tokens": word, "targets": "<i4", "documents": "<u2", "entropy": "<f2", "n_words": "u1"}
        return rows | {"ids": word, "counts": "u1", "log_p": "<f2"}

    def rows(self, start: int, stop: int) -> TargetBlock:
        """Return some of the rows."""
        ends = np.concatenate(([0], np.cumsum(self.n_words.sum(1, dtype=np.int64))))
        entries = slice(int(ends[start]), int(ends[stop]))
        cuts = dict.fromkeys(ROW_ARRAYS, slice(start, stop)) | dict.fromkeys(ENTRY_ARRAYS, entries)
        return TargetBlock(**{name: getattr(self, name)[cut] for name, cut in cuts.items()})


def append_block(file: BinaryIO, spec: TargetsSpec, first_row: int, block: TargetBlock) -> int:
    """Write a block to the end of ``file`` and return its bytes."""
    data = b"".join(np.ascontiguousarray(getattr(block, name), dtype=dtype).tobytes()
                    for name, dtype in TargetBlock.dtypes(spec).items())  # fmt: skip
    data = zstandard.ZstdCompressor(level=3).compress(data)
    file.write(HEADER.pack(MAGIC, first_row, len(block.tokens), len(block.ids), len(data), zlib.crc32(data)))
    file.write(data)
    return HEADER.size + len(data)


def whole_blocks(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, rows, offset, end) of the complete blocks from the beginning of a shard."""
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at + HEADER.size <= size:
            file.seek(at)
            magic, first, rows, _, nbytes, _ = HEADER.unpack(file.read(HEADER.size))
            end = at + HEADER.size + nbytes
            if magic != MAGIC or end > size:
                return
            yield first, rows, at, end
            at = end


def write_spec(folder: Path, spec: TargetsSpec) -> None:
    """Describe the folder, or compare it with the description of an earlier call. Raises `DataError`.

    A folder may grow: more rows than before are accepted if its last shard is full.
    """
    if (folder / INDEX).exists():
        known = read_spec(folder)
        if known.n_rows < spec.n_rows and known.n_rows % known.shard_rows == 0:
            replace(known, n_rows=spec.n_rows).require(folder, spec)
        else:
            known.require(folder, spec)
            return
    record = {"format": FORMAT} | asdict(spec)
    write_json(folder / INDEX, record | {"sha256": digest_of(record)})


def read_spec(folder: Path) -> TargetsSpec:
    """Return the description of a folder. Raises `DataError` if it is missing or damaged."""
    path = folder / INDEX
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        digest = record.pop("sha256")
        if record["format"] != FORMAT or digest != digest_of(record):
            raise ValueError("its checksum or format differs")
        return TargetsSpec(**{key: value for key, value in record.items() if key != "format"})
    except FileNotFoundError:
        raise DataError(f"{folder}: holds no {INDEX}; make targets with herd shrink label") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); {_CURE}") from None


@contextmanager
def unfinished_shard(folder: Path, spec: TargetsSpec, number: int) -> Iterator[tuple[BinaryIO, int] | None]:
    """Yield a shard's file, to append to, and the next row to write. Rename the shard when it is whole.

    Yields None for a shard that is finished, or that another process is writing. A block that was not written
    to its end is removed, and so are blocks after it.
    """
    path = shard_path(folder, number)
    part = path.with_suffix(".part")
    if path.exists():
        yield None
        return
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        if path.exists():  # another process finished it in between
            yield None
            return
        next_row, kept = spec.rows_of_shard(number).start, 0
        for first, rows, at, end in whole_blocks(part):
            if first != next_row or _read_block(part, at, spec, number) is None:
                break
            next_row, kept = first + rows, end
        file.truncate(kept)
        yield file, next_row
        file.flush()
        os.fsync(file.fileno())
        if sum(rows for _, rows, *_ in whole_blocks(part)) == len(spec.rows_of_shard(number)):
            os.replace(part, path)


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a finished shard."""
    return folder / f"shard-{number:05d}.bin"


class Targets:
    """An opened folder of targets. Raises `DataError` unless all its shards are finished."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.spec = read_spec(self.folder)
        missing = [n for n in range(self.spec.n_shards) if not shard_path(self.folder, n).exists()]
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} of {self.spec.n_shards} shards are not finished; "
                "run the same herd shrink label again"
            )
        self._read = lru_cache(maxsize=64)(self._read_uncached)

    def require_tokenizer(self, sha256: str) -> None:
        """Raise `DataError` if the targets were made with another tokenizer."""
        if self.spec.tokenizer != sha256:
            raise DataError(
                f"{self.folder}: its targets are for the tokenizer of hash {self.spec.tokenizer[:12]}, the "
                f"model's is {sha256[:12]}: label with the student's own tokenizer"
            )

    @cached_property
    def sha256(self) -> str:
        """The identity of the targets: hash of the description."""
        return digest_of(asdict(self.spec))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard_path(self.folder, n).stat().st_size for n in range(self.spec.n_shards))

    @cached_property
    def _offsets(self) -> list[dict[int, int]]:
        """The offset of each block of each shard, by its first row."""
        found = []
        for number in range(self.spec.n_shards):
            path = shard_path(self.folder, number)
            blocks = list(whole_blocks(path))
            if sum(rows for _, rows, *_ in blocks) != len(self.spec.rows_of_shard(number)):
                raise DataError(f"{path}: truncated; {_CURE}")
            found.append({first: at for first, _, at, _ in blocks})
        return found

    def row(self, number: int) -> TargetBlock:
        """Return one row. Raises `DataError` if its block is corrupt."""
        block = self._read(number // self.spec.block_rows)
        return block.rows(number % self.spec.block_rows, number % self.spec.block_rows + 1)

    def _read_uncached(self, number: int) -> TargetBlock:
        first = number * self.spec.block_rows
        shard = first // self.spec.shard_rows
        path = shard_path(self.folder, shard)
        block = _read_block(path, self._offsets[shard][first], self.spec, shard)
        if block is None:
            raise DataError(f"{path}: corrupt, the checksum of row {first} differs; {_CURE}")
        return block


class TargetStream:
    """The rows of a folder of targets, in another order in every epoch.

    The extras of a batch are ``ids`` (B, T, J), ``weights`` (fractions of the draws, 0 for padding),
    ``log_p`` and ``entropy`` (B, T).
    """

    def __init__(self, targets: Targets, seed: int) -> None:
        self.targets, self.seed = targets, seed
        self.context, self.n_rows = targets.spec.context, targets.spec.n_rows
        self.packed = True

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``."""
        check_range(position, count)
        numbers = [epoch_row(at, self.n_rows, self.seed) for at in range(position, position + count)]
        return joined_rows([self.targets.row(number) for number in numbers], self.targets.spec.n_draws)


def joined_rows(rows: list[TargetBlock], n_draws: int) -> Batch:
    """Return the batch of several rows, with the draws of each token padded to the same number of words."""
    names = (*ROW_ARRAYS, *ENTRY_ARRAYS)
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in names}
    n_words_BT = arrays["n_words"].astype(np.int64)
    B, T = n_words_BT.shape
    here_BTJ = np.arange(max(1, int(n_words_BT.max()))) < n_words_BT[..., None]
    extras: dict[str, torch.Tensor] = {"entropy": torch.from_numpy(arrays["entropy"].astype(np.float32))}
    for name, values, dtype in (
        ("ids", arrays["ids"], np.int64),
        ("weights", arrays["counts"].astype(np.float32) / n_draws, np.float32),
        ("log_p", arrays["log_p"], np.float32),
    ):
        padded_BTJ = np.zeros(here_BTJ.shape, dtype)
        padded_BTJ[here_BTJ] = values
        extras[name] = torch.from_numpy(padded_BTJ)
    tokens_BT, targets_BT, documents_BT = (
        torch.from_numpy(arrays[name].astype(np.int64)) for name in ("tokens", "targets", "documents")
    )
    index_T = torch.arange(T).expand(B, T)
    begins_BT = torch.ones(B, T, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT = torch.where(begins_BT, index_T, 0).cummax(dim=1).values
    return Batch(tokens_BT, targets_BT, index_T - starts_BT, documents_BT, extras)


def _read_block(path: Path, at: int, spec: TargetsSpec, shard: int) -> TargetBlock | None:
    """Return the block at an offset, or None if its checksum differs or it is not a block of this shard."""
    with path.open("rb") as file:
        file.seek(at)
        _, first, B, E, nbytes, crc = HEADER.unpack(file.read(HEADER.size))
        data = file.read(nbytes)
    if zlib.crc32(data) != crc or first not in spec.rows_of_shard(shard):
        return None
    data = zstandard.ZstdDecompressor().decompress(data)
    arrays: dict[str, Any] = {}
    place = 0
    for name, dtype in TargetBlock.dtypes(spec).items():
        shape = (E,) if name in ENTRY_ARRAYS else (B, spec.context)
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype=dtype, count=count, offset=place).reshape(shape)
        place += count * np.dtype(dtype).itemsize
    return TargetBlock(**arrays) if place == len(data) else None
