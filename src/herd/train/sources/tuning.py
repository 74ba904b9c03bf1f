"""A user's own files for tuning: some of their rows are held out, and other files may be mixed in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...data.batch import Batch
from ...data.packing import DialogStream
from ...data.pairs import PairStream
from ...data.stream import MixStream, Stream
from ...data.text_files import expand_paths, list_files
from ...data.tuning import AnswerPair, Example, read_tuning, split_heldout
from ...text import Tokenizer
from ..config import TrainSettings
from ..section import Fraction
from .base import DataSection, OpenedData, padding, source_file

MAX_HELDOUT = 200
"""Most examples that are held out of the user's files."""


class TuningFiles(DataSection):
    """Files of examples. Without ``heldout``, a share of them is held out to measure on."""

    paths: Annotated[list[str], Field(min_length=1)]
    heldout_share: Fraction = 0.05

    @property
    def has_heldout(self) -> bool:
        return self.heldout is not None or self.heldout_share > 0

    def trained_paths(self) -> list[str]:
        return self.paths

    def origin(self) -> tuple[list[tuple[str, Path]], dict[str, Any]]:
        paths = [path for name in self.paths_given() for path in expand_paths(name)]
        files = [source_file(file) for path in paths for file in list_files(path)]
        _, settings = super().origin()
        return files, settings


class TuningData(TuningFiles):
    """Dialogs and texts to imitate. ``replay`` are other files, mixed in so that the model does not forget.

    Rows that cannot be used are left out, and `data.tuning.read_tuning` says which and why.
    """

    kind: Literal["tuning"]
    replay: Annotated[tuple[str, ...], Field(strict=False)] = ()
    replay_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the rows
    rows = "dialogs"

    def trained_paths(self) -> list[str]:
        return [*self.paths, *self.replay]

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        train, heldout = self.divided(tokenizer, settings.context)
        stream: Stream = self._stream(train, tokenizer, settings)
        digest = hashlib.sha256(_digest(train))
        if self.replay:
            others = read_tuning(self.replay, tokenizer, settings.context).require_examples()
            digest.update(_digest(others))
            shares = (1 - self.replay_share, self.replay_share)
            own, other = stream, self._stream(others, tokenizer, settings)
            stream = MixStream([own, other], shares, settings.seed)
            stream.n_rows = int(own.n_rows / shares[0])  # an epoch is one of the user's own rows
        rows: list[Batch] = []
        if heldout:
            rows = self.first_rows(self._stream(heldout, tokenizer, settings), settings)
        return OpenedData(stream, rows, digest.hexdigest())

    def divided(self, tokenizer: Tokenizer, context: int) -> tuple[list[Example], list[Example]]:
        """Return the examples to train on and those to measure on."""
        examples = read_tuning(self.paths, tokenizer, context).require_examples()
        if self.heldout is not None:
            return examples, read_tuning([self.heldout], tokenizer, context).require_examples()
        return split_heldout(examples, self.heldout_share, MAX_HELDOUT)

    def _stream(
        self, examples: Sequence[Example], tokenizer: Tokenizer, settings: TrainSettings
    ) -> DialogStream:
        rendered = [example.rendered for example in examples]
        return DialogStream(rendered, settings.context, settings.seed, pad_id=padding(tokenizer))


class PreferenceData(TuningFiles):
    """Pairs of a chosen and a rejected answer. ``mask_ends``: the tokens that end answers are not trained."""

    kind: Literal["preferences"]
    mask_ends: bool = True
    rows = "pairs"

    def open(self, tokenizer: Tokenizer, out: Path, settings: TrainSettings) -> OpenedData:
        train, _ = self.divided(tokenizer, settings.context)
        stream = PairStream(train, settings.context, settings.seed, pad_id=padding(tokenizer))
        text = json.dumps([[pair.chosen.ids, pair.rejected.ids, pair.chosen.mask] for pair in train])
        return OpenedData(stream, [], hashlib.sha256(text.encode()).hexdigest())

    def divided(self, tokenizer: Tokenizer, context: int) -> tuple[list[AnswerPair], list[AnswerPair]]:
        """Return the pairs to train on and those to measure on, both answers within a row of ``context``."""
        pairs = read_tuning(self.paths, tokenizer, context, mask_ends=self.mask_ends).require_pairs()
        if self.heldout is not None:
            others = read_tuning([self.heldout], tokenizer, context, mask_ends=self.mask_ends)
            return pairs, others.require_pairs()
        return split_heldout(pairs, self.heldout_share, MAX_HELDOUT)


def _digest(examples: Sequence[Example]) -> bytes:
    return json.dumps([[example.rendered.ids, example.rendered.mask] for example in examples]).encode()
