"""A mixture of other sources: the rows of a step come from all of them, by weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...data.batch import Batch
from ...data.stream import MixStream, Stream
from ...text import Tokenizer
from ..config import TrainSettings
from ..section import impossible
from .base import DataSection, OpenedData, warn_of_repeats
from .dialogs import DialogData
from .made_dialogs import MadeDialogData
from .shards import ShardData
from .synthetic import CopyData, LookupData, NeedleData
from .text import TextData

Single = TextData | ShardData | DialogData | MadeDialogData | CopyData | LookupData | NeedleData
"""A source that is not a mixture."""


class MixData(DataSection):
    """Rows of several sources, each with a share in proportion to its ``weight``."""

    kind: Literal["mix"]
    mix: Annotated[list[Annotated[Single, Field(discriminator="kind")]], Field(min_length=1)]
    rows = "mix"

    @model_validator(mode="after")
    def _heldout_belongs_to_parts(self) -> MixData:
        if self.heldout is not None:
            raise impossible("heldout", "a mix is evaluated on the heldout of its sources: give it there")
        return self

    @property
    def has_heldout(self) -> bool:
        return any(part.has_heldout for part in self.mix)

    @property
    def has_text(self) -> bool:
        return any(part.has_text for part in self.mix)

    def trained_paths(self) -> list[str]:
        return [path for part in self.mix for path in part.trained_paths()]

    def heldout_paths(self) -> list[str]:
        return [path for part in self.mix for path in part.heldout_paths()]

    def origin(self) -> tuple[list[tuple[str, Path]], dict[str, Any]]:
        files: list[tuple[str, Path]] = []
        settings: dict[str, Any] = {}
        for number, part in enumerate(self.mix):
            own, more = part.origin()
            files += [(f"{number}/{name}", path) for name, path in own]
            settings |= {
                f"data.mix.{number}.{name.removeprefix('data.')}": value for name, value in more.items()
            }
            settings[f"data.mix.{number}.kind"] = part.kind
        return files, settings

    def texts(self) -> Iterator[str]:
        for part in self.mix:
            if part.has_text:
                yield from part.texts()

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        streams: list[Stream] = []
        heldout: list[Batch] = []
        probes: dict[str, list[Batch]] = {}
        digest = hashlib.sha256()
        total = sum(part.weight for part in self.mix)
        for number, part in enumerate(self.mix):
            # Two sources of one kind must not read the same rows in the same order.
            own = settings.model_copy(update={"seed": settings.seed + 1_000_033 * number})
            opened = part.open(tokenizer, out / "parts" / str(number), own)
            label = f"{part.kind} {Path(getattr(part, 'folder', str(number))).name} of the mix"
            warn_of_repeats(label, opened.stream, settings, part.weight / total)
            streams.append(opened.stream)
            heldout += opened.heldout
            for name, batches in opened.probes.items():
                probes[name] = probes.get(name, []) + batches
            digest.update(json.dumps([opened.hash, part.weight]).encode())
        stream = MixStream(streams, [part.weight for part in self.mix], settings.seed)
        return OpenedData(stream, heldout, digest.hexdigest(), probes=probes)
