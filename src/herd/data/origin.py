"""Record the sources of prepared data, so that training refuses data whose sources have changed since.

A folder with prepared data (a trained tokenizer, token shards, the state of a run that read them) has a file
``data.json``: the SHA-256 of every source file in reading order, and the settings of the preparation. `bind`
writes the record before anything is prepared, and compares it with the sources at every later start.

A file is hashed once: if its size, modification time, change time and inode are the same as in the record,
the recorded hash is used. Otherwise the file is read again. So touching or moving a file is allowed, and
editing it is not.
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
"""Version of splitting, deduplication and shards. Data prepared by another version is refused."""
SHOWN = 3
"""Number of differences that an error lists. The others are only counted."""


@dataclass(frozen=True)
class SourceFile:
    """A source file: its name in documents, the hash of its content, and its status when it was hashed."""

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
        """Return the changes from this record to ``new``, one phrase for each setting and file."""
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
    """Record the sources of the data in ``folder``, or compare them with the record of data prepared before.

    ``files`` are the (name, path) of every source file in reading order. ``prepared`` are the paths of
    prepared data: while none of them exists, the record is replaced. ``cure`` tells the user what to do and
    ends the error message. Raises DataError for differences, and if prepared data has no record.
    """
    old = _read(folder / RECORD)
    found = next((path for path in prepared if path.exists()), None)
    if found is not None and old is None:
        why = f"is there already, without a record of what it was made from ({RECORD})"
        raise DataError(f"{found}: {why}; choose another folder, or move it away")
    known = {file.path: file for file in old.files} if old is not None else {}
    values: dict[str, Any] = json.loads(json.dumps({"preparation": PREPARATION, **settings}))
    new = Origin(tuple(_source_file(name, path, known) for name, path in files), values)
    if found is not None and old is not None and (differences := old.differences(new)):
        shown = "; ".join(differences[:SHOWN])
        more = f"; and {len(differences) - SHOWN} more differences" if len(differences) > SHOWN else ""
        raise DataError(f"{folder}: its data was prepared from other sources: {shown}{more}. {cure}")
    if new != old:
        record = {"format": FORMAT, "settings": new.settings, "files": [asdict(file) for file in new.files]}
        write_atomically(folder / RECORD, json.dumps(record, indent=1))


def builtin_identity() -> str:
    """Return an identifier of the built-in corpus: the version of Python and a hash of the sentences."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "parallel").glob("*.txt")):
        digest.update(file.read_bytes())
    return f"Python {sysconfig.get_config_var('VERSION')} library, sentences {digest.hexdigest()[:12]}"


def _source_file(name: str, path: Path, known: Mapping[str, SourceFile]) -> SourceFile:
    path_name = str(path)
    try:
        status = path.stat()
        seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        old = known.get(path_name)
        if old is not None and (old.n_bytes, old.modified_ns, old.changed_ns, old.inode) == seen:
            sha256 = old.sha256
        else:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file that exists") from None
    return SourceFile(name, path_name, sha256, *seen)


def _read(path: Path) -> Origin | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r} instead of {FORMAT!r}")
        return Origin(tuple(SourceFile(**file) for file in record["files"]), dict(record["settings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not a record of sources ({error}); restore it, or choose another folder"
        ) from None
