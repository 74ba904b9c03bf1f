"""Divide a corpus into three splits that share no text: teacher, student and held-out.

The split of a document depends only on the hash of its file's name, not on the order of reading, the machine
or the rest of the corpus. Documents of one file (its docstrings, its translations) stay together. Before the
division, exact copies are dropped. After it, long paragraphs that are already in another split (licence
headers, copied functions) are removed. Llama 3 removes duplicates at the same three levels: documents, lines,
sources (paper, section 3.1.1).
"""

from __future__ import annotations

import filecmp
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .builtin import read_builtin
from .hub import read_hub
from .origin import builtin_identity
from .shards import INDEX
from .sources import Document, part_chars, read_path
from .text_files import DataWarning, expand_paths, list_files

SPLITS = ("teacher", "student", "heldout")
FRACTIONS = (0.6, 0.3, 0.1)
"""Fraction of the files in each split: the teacher needs the most text, evaluation the least."""

PARAGRAPH_CHARS = 120
"""Characters from which a paragraph may be in one split only. Shorter ones are common phrases."""

BLANK = re.compile(r"\n[ \t]*\n+")
HUB = "hf:"
Spec = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class Corpus:
    """Documents by split, in reading order, and notes on text that was left out."""

    splits: dict[str, list[Document]]
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return {split: {"kind/lang": (documents, bytes)}}, sorted by name."""
        table: dict[str, dict[str, tuple[int, int]]] = {}
        for split, documents in self.splits.items():
            row: dict[str, tuple[int, int]] = {}
            for document in documents:
                label = f"{document.kind}/{document.lang}"
                n_documents, n_bytes = row.get(label, (0, 0))
                row[label] = (n_documents + 1, n_bytes + document.n_bytes)
            table[split] = dict(sorted(row.items()))
        return table

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all splits."""
        return sum(document.n_bytes for documents in self.splits.values() for document in documents)


def read_corpus(spec: Spec = None) -> Iterator[Document]:
    """Yield the documents of a specification, always in the same order, before any division or removal.

    ``spec`` is None for the built-in corpus, or a file, a folder, a pattern (``text/*.txt``),
    ``hf:owner/name``, or a list of these. Raises DataError for anything missing, empty, binary or broken.
    """
    if spec is None:
        yield from read_builtin()
        return
    paths = _expanded(spec)
    local = [path for path in paths if isinstance(path, Path)]
    names = Counter(path.name for path in local)
    size = part_chars([file for path in local for file in list_files(path)])
    for path in paths:
        if isinstance(path, str):
            yield from read_hub(path.removeprefix(HUB))
        elif names[path.name] > 1:  # several paths of one name: use the whole path
            yield from (
                replace(document, source=f"{path}/{document.source}") for document in read_path(path, size)
            )
        else:
            yield from read_path(path, size)


def _expanded(spec: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """Return the paths of a specification, with ``~`` and patterns expanded, and hub names as strings."""
    paths: list[Path | str] = []
    for name in [spec] if isinstance(spec, str | Path) else spec:
        paths += [str(name)] if str(name).startswith(HUB) else expand_paths(name)
    return paths


def require_apart(out: Path, paths: Iterable[str]) -> None:
    """Raise DataError if a path is missing, or is a folder around ``out``, where a run writes files."""
    place = out.resolve()
    for path in _expanded(list(paths)):
        if isinstance(path, Path) and path.is_dir() and place.is_relative_to(path.resolve()):
            raise DataError(
                f"{path}: has the run's own folder {out} inside, whose files would be read as data; "
                "give an --out outside of it"
            )


def require_unseen(heldout: Sequence[str], trained: Sequence[str]) -> None:
    """Raise DataError if a held-out file is among those to train on, or has the content of one."""
    by_size: dict[int, list[Path]] = {}
    for file in _files(trained):
        by_size.setdefault(file.stat().st_size, []).append(file)
    for held in _files(heldout):
        size = held.stat().st_size
        for file in by_size.get(size, ()) if size else ():
            if filecmp.cmp(held, file, shallow=False):
                how = "is the same file" if held.samefile(file) else "has the same content"
                raise DataError(
                    f"{held}: is held out, but {file} is trained on and {how}; take it out of one of the two"
                )


def _files(spec: Sequence[str]) -> Iterator[Path]:
    """Yield the local files of a specification, of a folder of shards only its index (with checksums)."""
    for path in _expanded(spec):
        if isinstance(path, Path):
            index = path / INDEX
            yield from [index] if index.is_file() else list_files(path)


def corpus_origin(spec: Spec = None) -> tuple[list[tuple[str, Path]], dict[str, Any]]:
    """Return the (name, path) of a specification's local files and its other settings, for `origin.bind`.

    Data sets of the hub are represented by their names only. Raises DataError if a path is missing.
    """
    if spec is None:
        return [], {"text": builtin_identity()}
    paths = _expanded(spec)
    files: list[tuple[str, Path]] = []
    for root in (path for path in paths if isinstance(path, Path)):
        files += [
            (root.name if file == root else f"{root.name}/{file.relative_to(root).as_posix()}", file)
            for file in list_files(root)
        ]
    return files, {"hub": [path for path in paths if isinstance(path, str)]}


def load_corpus(spec: Spec = None, *, max_bytes: int | None = None) -> Corpus:
    """Read, split and deduplicate a corpus that fits into memory.

    If ``max_bytes`` is given, reading stops after that many bytes of text, with a warning.
    """
    caught: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", DataWarning)
        documents = list(_until(read_corpus(spec), max_bytes))
    for warning in record:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if issubclass(warning.category, DataWarning):
            caught.append(str(warning.message))
    corpus = split_corpus(documents)
    return replace(corpus, notes=(*caught, *corpus.notes))


def split_of(source: str, fractions: Sequence[float] = FRACTIONS) -> str:
    """Return the split of a source. It depends only on the file's name (the part before ``#``)."""
    digest = hashlib.sha256(source.partition("#")[0].encode("utf-8")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64 * sum(fractions)
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if position < fraction:
            return split
        position -= fraction
    return SPLITS[-1]


def split_corpus(documents: Iterable[Document], fractions: Sequence[float] = FRACTIONS) -> Corpus:
    """Divide documents by their files so that no document and no long paragraph is in two splits.

    Raises DataError if there are fewer than three files (or parts of files), since each split needs one.
    """
    kept, n_copies = _unique(documents)
    files = sorted({document.source.partition("#")[0] for document in kept})
    if not kept:
        raise DataError("corpus: empty, no document has text; give text with --text")
    if len(files) < len(SPLITS):
        size = sum(document.n_bytes for document in kept)
        raise DataError(
            f"corpus: {size} bytes in {len(files)} piece(s) cannot be divided into {', '.join(SPLITS)}; "
            "give more text (at least about 10 kB)"
        )
    homes, notes = _homes(files, fractions)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    seen: dict[bytes, str] = {}
    n_shared = 0
    for document in kept:
        split = homes[document.source.partition("#")[0]]
        text, n = _without_shared(document.text, split, seen)
        n_shared += n
        if text.strip():
            splits[split].append(document if n == 0 else replace(document, text=text))
    for split, members in splits.items():
        if not members:
            raise DataError(f"corpus: the {split} split is empty after the removal of copies; give more text")
    if n_copies:
        notes.append(f"corpus: left out {n_copies} documents that are copies of others")
    if n_shared:
        notes.append(f"corpus: removed {n_shared} paragraphs that are in another split too")
    return Corpus(splits, tuple(notes))


def _homes(files: list[str], fractions: Sequence[float]) -> tuple[dict[str, str], list[str]]:
    """Return the split of each file, and notes. A split without any file gets one, with a warning."""
    homes = {file: split_of(file, fractions) for file in files}
    notes = []
    for split in SPLITS:
        sizes = Counter(homes.values())
        if sizes[split] == 0:
            largest = max(SPLITS, key=lambda name: sizes[name])
            file = min(file for file in files if homes[file] == largest)
            homes[file] = split
            notes.append(
                f"corpus: only {len(files)} pieces of text; moved {file} to the {split} split, which had none"
            )
            warnings.warn(notes[-1], DataWarning, stacklevel=3)
    return homes, notes


def _unique(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """Return the documents without copies, ignoring white space, and the number of copies."""
    seen: set[bytes] = set()
    kept: list[Document] = []
    n = 0
    for document in documents:
        if not document.text.strip():
            continue
        n += 1
        key = _key(document.text)
        if key not in seen:
            seen.add(key)
            kept.append(document)
    return kept, n - len(kept)


def _without_shared(text: str, split: str, seen: dict[bytes, str]) -> tuple[str, int]:
    """Remove long paragraphs that are in another split. Return the text and the number removed.

    The other long paragraphs are added to ``seen``.
    """
    pieces, n, start = [], 0, 0
    ends = [match.end() for match in BLANK.finditer(text)] + [len(text)]
    for end in ends:
        paragraph = text[start:end]
        start = end
        if len(paragraph) >= PARAGRAPH_CHARS and seen.setdefault(_key(paragraph), split) != split:
            n += 1
        else:
            pieces.append(paragraph)
    return "".join(pieces), n


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()


def _until(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    total = 0
    for document in documents:
        yield document
        total += document.n_bytes
        if max_bytes is not None and total >= max_bytes:
            warnings.warn(
                f"corpus: stopped after {total:,} bytes of text, at the limit of {max_bytes:,}",
                DataWarning,
                stacklevel=2,
            )
            return
