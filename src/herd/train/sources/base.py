"""The base of all sources of training data."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...data import targets
from ...data.batch import Batch
from ...data.packing import DialogStream
from ...data.shards import INDEX, Shards
from ...data.stream import Stream, TokenStream, first_rows
from ...data.text_files import DataWarning, expand_paths
from ...text import Rendered, Tokenizer
from ..config import TrainSettings
from ..section import Positive, PositiveReal, Section


@dataclass(frozen=True)
class OpenedData:
    """The stream that a run trains on, its held-out rows, and the hash of the data for states and lineage.

    ``probes`` are fresh rows by kind ("copy") for which the accuracy of the trained tokens is measured.
    """

    stream: Stream
    heldout: list[Batch]
    hash: str
    probes: Mapping[str, list[Batch]] = field(default_factory=dict)


class DataSection(Section):
    """The section ``data`` of a recipe."""

    rows: ClassVar[str]
    """The content of a row: "text", "dialogs", "pairs" or "mix"."""
    kind: str
    weight: PositiveReal = 1.0  # of the source in a mix: its share of the rows
    heldout: str | None = None  # shards, or a file of dialogs, to evaluate on
    heldout_rows: Positive = 64

    @property
    def has_heldout(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.heldout is not None

    @property
    def has_text(self) -> bool:
        """Whether `texts` yields documents that a new tokenizer can be trained on."""
        return False

    def trained_paths(self) -> list[str]:
        """Return the local paths, perhaps with patterns, of what is trained on."""
        return []

    def heldout_paths(self) -> list[str]:
        """Return the local paths of what is only evaluated on."""
        return [] if self.heldout is None else [self.heldout]

    def paths_given(self) -> list[str]:
        """Return the paths that must exist before the run starts."""
        return self.trained_paths() + self.heldout_paths()

    def origin(self) -> tuple[list[tuple[str, Path]], dict[str, Any]]:
        """Return the (name, path) of the files that the data is made from, and the settings that shape it."""
        files = [file for path in self.paths_given() for file in map(source_file, expand_paths(path))]
        own = self.model_dump(
            mode="json", exclude={"kind", "heldout", "heldout_rows", "paths", "folder", "path", "weight"}
        )
        return files, {f"data.{name}": value for name, value in own.items()}

    def texts(self) -> Iterator[str]:
        """Yield the documents that a new tokenizer is trained on."""
        raise NotImplementedError

    @abstractmethod
    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        """Open the data. Prepared data is written below ``out`` unless it exists."""

    def first_rows(self, stream: Stream, settings: TrainSettings) -> list[Batch]:
        """Return the rows to evaluate on, in batches of the run's size."""
        return first_rows(stream, self.heldout_rows, settings.micro_batch_size or 8)

    def heldout_shards(self, tokenizer: Tokenizer, settings: TrainSettings) -> list[Batch]:
        """Return the first rows of the shards ``heldout``, or nothing if none are named."""
        if self.heldout is None:
            return []
        shards = Shards.open(expand_paths(self.heldout)[0], tokenizer)
        return self.first_rows(TokenStream(shards, settings.context, 0), settings)

    def pack(
        self,
        dialogs: Sequence[Rendered],
        heldout: Sequence[Rendered],
        tokenizer: Tokenizer,
        settings: TrainSettings,
    ) -> OpenedData:
        """Pack rendered dialogs into rows."""
        stream = DialogStream(dialogs, settings.context, settings.seed, pad_id=padding(tokenizer))
        rows = []
        if heldout:
            other = DialogStream(heldout, settings.context, 0, pad_id=padding(tokenizer))
            rows = self.first_rows(other, settings)
        digest = hashlib.sha256()
        for dialog in dialogs:
            digest.update(json.dumps([dialog.ids, dialog.mask]).encode())
        return OpenedData(stream, rows, digest.hexdigest())


def warn_of_repeats(name: str, stream: Stream, settings: TrainSettings, share: float = 1.0) -> None:
    """Warn if a run reads a stream more than once. ``share`` is the stream's fraction of the run's rows."""
    passes = share * settings.steps * settings.batch_size / stream.n_rows
    if passes > 1:
        warnings.warn(f"{name}: the data is read {passes:.1f} times", DataWarning, stacklevel=3)


def padding(tokenizer: Tokenizer) -> int:
    """Return the token that fills the rest of a row. Any token can, because padding is never a target."""
    return next((id_ for id_ in (tokenizer.pad_id, tokenizer.eos_id) if id_ is not None), 0)


def source_file(path: Path) -> tuple[str, Path]:
    """Return the name and the file whose content identifies a path.

    For a folder of shards that is the index, which has the checksums of the other files, and for a folder of
    targets the description, which has the hashes of text and teacher.
    """
    if not path.is_dir():
        return path.name, path
    index = targets.INDEX if (path / targets.INDEX).exists() else INDEX
    return f"{path.name}/{index}", path / index
