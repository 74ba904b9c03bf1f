"""Store a corpus as shards: plain arrays of token ids on disk that are memory-mapped.

A folder contains ``tokens-00000.bin`` … (documents ``<|begin_of_text|> … <|end_of_text|>`` in little-endian
uint16, or uint32 for vocabularies above 65,536), ``documents.bin`` (the first token of each document, the
UTF-8 bytes of its text, and its label) and ``index.json``. All files but the last have the same number of
tokens, so the file of a token is found by division.

Everything is checked: the index has its own checksum and the tokenizer's hash, file lengths are compared when
the folder is opened, and each file's CRC-32 is compared once, when the file is first read (about 1 GB/s).

Shapes: N tokens, D documents.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import DataError
from ..files import whole_folder, write_json
from .sources import Document

FORMAT = "herd-shards-1"
FILE_TOKENS = 1 << 26
DOCUMENT = np.dtype([("start", "<i8"), ("n_bytes", "<i8"), ("label", "<i8")])
"""A record of ``documents.bin``: first token, UTF-8 bytes of the text, index into the labels."""

INDEX, DOCUMENTS = "index.json", "documents.bin"
CURE = "remove this folder and make the shards again"


class Encoder(Protocol):
    """The part of a tokenizer that shards use."""

    vocab_size: int

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]: ...


@dataclass
class Shards:
    """An opened folder of tokens. ``documents_D`` are its memory-mapped `DOCUMENT` records."""

    folder: Path
    index: dict[str, Any]
    documents_D: np.ndarray
    files: list[np.ndarray] = field(repr=False)
    checked: set[int] = field(default_factory=set, repr=False)

    @staticmethod
    def write(
        folder: Path | str,
        documents: Iterable[Document | str],
        tokenizer: Encoder,
        *,
        file_tokens: int = FILE_TOKENS,
    ) -> Shards:
        """Encode documents into a new folder and open it.

        Raises DataError if the folder exists or there are no documents, and StorageError if the disk is full.
        """
        folder = Path(folder)
        if folder.exists():
            raise DataError(f"{folder}: exists already; remove it or choose another folder")
        with whole_folder(folder) as temporary:
            _write_files(temporary, documents, tokenizer, file_tokens)
        return Shards.open(folder, tokenizer)

    @staticmethod
    def open(folder: Path | str, tokenizer: Encoder | None = None) -> Shards:
        """Open a folder. Raises DataError if it is missing, damaged or made with another tokenizer."""
        folder = Path(folder)
        index = _read_index(folder)
        if tokenizer is not None and tokenizer.sha256 != index["tokenizer_sha256"]:
            raise DataError(
                f"{folder}: made with the tokenizer of hash {index['tokenizer_sha256'][:12]}, not with "
                f"{tokenizer.sha256[:12]}; {CURE}"
            )
        dtype = np.dtype(index["dtype"])
        files = [_map(folder / entry["name"], dtype, entry["n_tokens"]) for entry in index["files"]]
        documents_D = _map(folder / DOCUMENTS, DOCUMENT, index["n_documents"])
        if _crc(documents_D) != index["documents_crc32"]:
            raise DataError(f"{folder / DOCUMENTS}: corrupt, its checksum differs; {CURE}")
        return Shards(folder, index, documents_D, files)

    @property
    def n_tokens(self) -> int:
        return int(self.index["n_tokens"])

    @property
    def n_documents(self) -> int:
        return len(self.documents_D)

    @property
    def sha256(self) -> str:
        """The identity of these tokens, for lineage: the hash of the index, tokenizer and CRCs included."""
        return str(self.index["sha256"])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop``, (N,) int64. Raises DataError if a file is corrupt."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise DataError(f"{self.folder}: tokens {start} to {stop} do not exist, it has {self.n_tokens}")
        out_N = np.empty(stop - start, dtype=np.int64)
        size = int(self.index["file_tokens"])
        at = start
        while at < stop:
            number, offset = divmod(at, size)
            n = min(stop - at, size - offset)
            out_N[at - start : at - start + n] = self._file(number)[offset : offset + n]
            at += n
        return out_N

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document, with begin and end of text, (N,) int64."""
        start = int(self.documents_D["start"][number])
        last = number + 1 == self.n_documents
        return self.tokens(start, self.n_tokens if last else int(self.documents_D["start"][number + 1]))

    def label(self, number: int) -> str:
        """Return the label of one document, ``kind/lang``."""
        return str(self.index["labels"][int(self.documents_D["label"][number])])

    def _file(self, number: int) -> np.ndarray:
        tokens_N = self.files[number]
        if number not in self.checked:
            entry = self.index["files"][number]
            if _crc(tokens_N) != entry["crc32"]:
                raise DataError(f"{self.folder / entry['name']}: corrupt, its checksum differs; {CURE}")
            self.checked.add(number)
        return tokens_N


class _Writer:
    """A writer that splits a stream of tokens into files of ``file_tokens``."""

    def __init__(self, folder: Path, dtype: np.dtype, file_tokens: int) -> None:
        self.folder, self.dtype, self.file_tokens = folder, dtype, file_tokens
        self.entries: list[dict[str, Any]] = []
        self.file: Any = None
        self.n_tokens = 0

    def write(self, ids_N: np.ndarray) -> None:
        while len(ids_N):
            if self.file is None:
                name = f"tokens-{len(self.entries):05d}.bin"
                self.entries.append({"name": name, "n_tokens": 0, "crc32": 0})
                self.file = open(self.folder / name, "wb")  # noqa: SIM115 -- closed when full
            entry = self.entries[-1]
            part_N, ids_N = np.split(ids_N, [self.file_tokens - entry["n_tokens"]])
            data = part_N.astype(self.dtype).tobytes()
            self.file.write(data)
            entry["crc32"] = zlib.crc32(data, entry["crc32"])
            entry["n_tokens"] += len(part_N)
            self.n_tokens += len(part_N)
            if entry["n_tokens"] == self.file_tokens:
                self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _write_files(
    folder: Path, documents: Iterable[Document | str], tokenizer: Encoder, file_tokens: int
) -> None:
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    writer = _Writer(folder, dtype, file_tokens)
    labels: dict[str, int] = {}
    records = []
    for document in documents:
        if isinstance(document, str):
            document = Document(document, "")
        ids_N = np.asarray(tokenizer.encode(document.text, bos=True, eos=True), dtype=np.int64)
        if ids_N.min() < 0 or ids_N.max() >= tokenizer.vocab_size:
            raise DataError(
                f"{document.source}: token {ids_N.max()} is outside the vocabulary of {tokenizer.vocab_size}"
            )
        label = labels.setdefault(f"{document.kind}/{document.lang}", len(labels))
        records.append((writer.n_tokens, document.n_bytes, label))
        writer.write(ids_N)
    writer.close()
    if not records:
        raise DataError(f"{folder.parent}: no documents to write shards from; give text")
    table_D = np.array(records, dtype=DOCUMENT)
    (folder / DOCUMENTS).write_bytes(table_D.tobytes())
    index = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.str,
        "file_tokens": file_tokens,
        "n_tokens": writer.n_tokens,
        "n_documents": len(records),
        "n_bytes": int(table_D["n_bytes"].sum()),
        "documents_crc32": _crc(table_D),
        "labels": list(labels),
        "files": writer.entries,
    }
    index["sha256"] = digest_of(index)
    write_json(folder / INDEX, index)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: not a folder of shards, it has no {INDEX}; make shards first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable ({error}); {CURE}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        format_name = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise DataError(f"{path}: format {format_name!r}, expected {FORMAT!r}; {CURE}")
    if index.pop("sha256", None) != (digest := digest_of(index)):
        raise DataError(f"{path}: corrupt, its checksum differs; {CURE}")
    return {**index, "sha256": digest}


def _map(path: Path, dtype: np.dtype, n: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {CURE}") from None
    if size != n * dtype.itemsize:
        raise DataError(f"{path}: truncated, {size} bytes instead of {n * dtype.itemsize}; {CURE}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(n,))


def digest_of(index: Mapping[str, Any]) -> str:
    """Return the hex sha256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _crc(array: np.ndarray) -> int:
    view = np.ascontiguousarray(array).view(np.uint8).data
    crc, step = 0, 1 << 24
    for at in range(0, len(view), step):
        crc = zlib.crc32(view[at : at + step], crc)
    return crc
