"""The data of a run in its folder: the tokenizer, and token shards by split and kind of text."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.corpus import SPLITS
from ..data.shards import Shards
from ..data.sources import Document
from ..errors import DataError
from ..text import Tokenizer
from .plan import Plan

MAX_PASSES = 8
"""Most passes over a text before a small model learns it by heart."""
KINDS = ("text", "parallel", "code")
"""Kinds of text, those that needles are hidden in first."""


@dataclass(frozen=True)
class RunData:
    """The data of a run, opened from its folder."""

    plan: Plan
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def write_shards(self, split: str, documents: list[Document], tokenizer: Tokenizer) -> None:
        """Write ``data/SPLIT-KIND`` for every kind of text that the documents have."""
        for kind in KINDS:
            folder = self.folder / "data" / f"{split}-{kind}"
            shutil.rmtree(folder, ignore_errors=True)  # left over if this stage was interrupted
            if selected := [document for document in documents if document.kind == kind]:
                Shards.write(folder, selected, tokenizer)

    def shards_of(self, split: str, context: int = 0) -> dict[str, Shards]:
        """Return the shards of a split that have more than ``context`` tokens, by kind of text."""
        folders = {kind: self.folder / "data" / f"{split}-{kind}" for kind in KINDS}
        opened = {
            kind: Shards.open(folder, self.tokenizer) for kind, folder in folders.items() if folder.exists()
        }
        return {kind: shards for kind, shards in opened.items() if shards.n_tokens > context}

    def filler(self, split: str) -> Shards:
        """Return the running text of a split that needles are hidden in: the largest of its shards."""
        return max(self.shards_of(split).values(), key=lambda shards: shards.n_tokens)

    def require_rows(self, corpus_bytes: int) -> None:
        """Raise `DataError` if a split has fewer tokens than one row of the longest context of any stage."""
        context = max(phase.context for stage in self.plan.training for phase in stage.phases)
        for split in SPLITS:
            n_tokens = max(shards.n_tokens for shards in self.shards_of(split).values())
            if n_tokens <= context:
                wanted = round(1.5 * corpus_bytes * context / n_tokens, -3)
                raise DataError(
                    f"{corpus_bytes:,} bytes of text are too few: the {split} part has {n_tokens:,} tokens, "
                    f"but one training row has {context:,}; give at least about {wanted:,.0f} bytes"
                )

    def notes_on_size(self, corpus_bytes: int) -> list[str]:
        """Return a warning if the teacher reads the text so often that it learns it by heart."""
        here = sum(shards.n_tokens for shards in self.shards_of("teacher").values())
        stages = [stage for stage in self.plan.training if stage.name not in ("student", "control")]
        read = sum(
            phase.tokens * sum(source["weight"] for source in phase.mix if source["kind"] == "corpus")
            for stage in stages
            for phase in stage.phases
        )
        passes = read / here
        if passes <= MAX_PASSES:
            return []
        wanted = round(corpus_bytes * passes / MAX_PASSES, -4)
        return [
            f"{corpus_bytes:,} bytes are little text: the models read it {passes:.0f} times and will repeat "
            f"it by heart rather than write new text. From about {wanted:,.0f} bytes on they do not."
        ]


def bytes_per_token(documents: Iterable[Document], tokenizer: Tokenizer) -> dict[str, float]:
    """Return the UTF-8 bytes per token of documents by language. Higher values mean fewer tokens."""
    sums: dict[str, list[int]] = {}
    texts = list(documents)
    for document, ids in zip(texts, tokenizer.encode_batch([d.text for d in texts]), strict=True):
        entry = sums.setdefault(document.lang or "text", [0, 0])
        entry[0] += document.n_bytes
        entry[1] += len(ids)
    return {lang: n_bytes / n_tokens for lang, (n_bytes, n_tokens) in sorted(sums.items())}
