"""The record of what prepared data was made from, so that stale data is refused rather than trained on.

A folder with prepared data (a trained tokenizer, token shards, the state of a run that read them) holds
``data.json``: the SHA-256 of every source file in reading order and the settings the preparation depends on.
`bind` writes the record before anything is prepared and compares it at every later start.

Hashing is done once: a file whose size, modification time, change time and inode are those in the record
keeps the hash in the record. Anything else is read again, so touching or moving a file is allowed and editing
it is not.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_atomically

RECORD = "data.json"
FORMAT = "herd-data-1"
PREPARATION = 1
"""Raise it when splitting, deduplication or the layout of shards changes: older prepared data is then
refused.
"""
SHOWN = 3
"""Differences named in an error; the rest are counted."""


@dataclass(frozen=True)
class SourceFile:
    """One source file: the name its documents carry, its content hash, and the file status the hash
    belongs to.
    """

    name: str
    path: str
    sha256: str
    n_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int


@dataclass(frozen=True)
class Origin:
    """The sources of prepared data: files in reading order, and settings by name (JSON values)."""

    files: tuple[SourceFile, ...]
    settings: dict[str, Any]

    def differences(self, new: Origin) -> list[str]:
        """Return what changed from this record to ``new``, one phrase for each setting and file."""
        found = [
            f"{name} was {self.settings.get(name)!r} and is now {new.settings.get(name)!r}"
            for name in dict.fromkeys([*self.settings, *new.settings])
            if self.settings.get(name) != new.settings.get(name)
        ]
        before, now = ({file.name: file for file in of.files} for of in (self, new))
        for name, old in before.items():
            if name in now and now[name].sha256 != old.sha256:
                was, is_ = (
                    f"{file.n_bytes:,} bytes, SHA-256 {file.sha256[:12]}" for file in (old, now[name])
                )
                found.append(f"{now[name].path} has other content ({was} before, {is_} now)")
        found += [f"{file.path} is a new source" for name, file in now.items() if name not in before]
        found += [f"{file.path} is no longer among the sources" for n, file in before.items() if n not in now]
        if not found and [f.name for f in self.files] != [f.name for f in new.files]:
            orders = (", ".join(file.name for file in of.files[:SHOWN]) for of in (self, new))
            found.append("the order of the source files was {} and is now {}".format(*orders))
        return found


def bind(
    folder: Path,
    files: Iterable[tuple[str, Path]],
    settings: Mapping[str, Any],
    *,
    prepared: Sequence[Path],
    cure: str,
) -> None:
    """Record in ``folder`` what its data is made from, or compare with the record if data was prepared
    before.

    ``files``: (name, path) of every source file in reading order. ``prepared``: the paths that hold prepared
    data; as long as none of them exists the record is replaced. ``cure``: what the user can do, the end of
    the error message. Raises DataError naming every difference, and where prepared data has no record.
    """
    old = _read(folder / RECORD)
    found = next((path for path in prepared if path.exists()), None)
    if found is not None and old is None:
        why = "prepared by a version of Herd that did not record its sources, so it cannot be checked"
        raise DataError(f"{found}: {why}; {cure}")
    known = {file.path: file for file in old.files} if old is not None else {}
    values: dict[str, Any] = json.loads(json.dumps({"preparation": PREPARATION, **settings}))
    new = Origin(tuple(_source_file(name, path, known) for name, path in files), values)
    if found is not None and old is not None and (differences := old.differences(new)):
        shown = "; ".join(differences[:SHOWN])
        more = f"; and {len(differences) - SHOWN} more differences" if len(differences) > SHOWN else ""
        raise DataError(f"{folder}: its data was prepared from something else: {shown}{more}. {cure}")
    if new != old:
        record = {"format": FORMAT, "settings": new.settings, "files": [asdict(file) for file in new.files]}
        write_atomically(folder / RECORD, json.dumps(record, indent=1))


def builtin_identity() -> str:
    """Return what identifies the built-in corpus: the Python whose library it is and the project's own
    sentences.
    """
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "parallel").glob("*.txt")):
        digest.update(file.read_bytes())
    return f"Python {sysconfig.get_config_var('VERSION')} library, sentences {digest.hexdigest()[:12]}"


def _source_file(name: str, path: Path, known: Mapping[str, SourceFile]) -> SourceFile:
    place = str(path)
    try:
        status = path.stat()
        seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        old = known.get(place)
        if old is not None and (old.n_bytes, old.modified_ns, old.changed_ns, old.inode) == seen:
            sha256 = old.sha256
        else:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file that exists") from None
    return SourceFile(name, place, sha256, *seen)


def _read(path: Path) -> Origin | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r} instead of {FORMAT!r}")
        return Origin(tuple(SourceFile(**file) for file in record["files"]), dict(record["settings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove its folder and prepare the data again") from None
