"""What a run is made of, opened from its folder: tokenizer, shards, dialogs, and the streams stages train on."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.corpus import Corpus
from ..data.dialogs import Dialog, stream_dialogs
from ..data.needle import NeedleMaker, RetrievalStream
from ..data.packing import DialogStream
from ..data.repetition import RepetitionStream
from ..data.shards import Shards
from ..data.sources import Document
from ..data.stream import MixStream, Stream, TokenStream
from ..errors import DataError
from ..text import Rendered, Tokenizer, render
from .plan import Plan

PARALLEL_SHARE = 0.08
"""Share of rows that are parallel sentences: Llama 3's share of multilingual text (paper section 3.1.2)."""
RETRIEVAL_SHARE, REPETITION_SHARE = 0.1, 0.15
"""Shares of pre-training rows that exercise copying, which a small model learns too slowly from text alone."""
REPLAY_SHARE = 0.22
"""Share of rows of plain text during instruct tuning, so that the model does not forget how to write."""
DIALOG_SHARE = 0.4
"""Share of rows of dialogs when a student learns from the instruct teacher."""

SHORT_DIALOG = 64
"""Tokens; dialogs have about a hundred."""
DIALOG_NBYTES = 1_250
"""Memory of one that is rendered and waits for its row."""

STUDENT_SEED = 1_000_003
"""Added to the plan's seed for everything the student sees: other dialogs than the teacher's, in another order."""


def is_parallel(document: Document) -> bool:
    return document.kind == "parallel"


def numbers() -> Iterator[str]:
    """All numbers of up to three digits, often enough that each becomes one token, as in Llama 3's own vocabulary."""
    line = " ".join(str(n) for n in range(1000))
    yield from (line for _ in range(200))


@dataclass(frozen=True)
class RaiseData:
    """Opened data of a run. Streams are pure functions, so any stage may make them anew."""

    plan: Plan
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def write_shards(self, split: str, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        """``data/SPLIT`` and, where there are parallel sentences, ``data/SPLIT-parallel``."""
        documents = list(documents)
        for name, chosen in (
            (split, [d for d in documents if not is_parallel(d)]),
            (f"{split}-parallel", [d for d in documents if is_parallel(d)]),
        ):
            folder = self.folder / "data" / name
            shutil.rmtree(
                folder, ignore_errors=True
            )  # of a start that was cut short: not yet a finished stage
            if chosen:
                folder.parent.mkdir(parents=True, exist_ok=True)
                Shards.write(folder, chosen, tokenizer)

    def shards(self, name: str) -> Shards | None:
        """``data/NAME``, or None where the corpus has nothing of it."""
        folder = self.folder / "data" / name
        return Shards.open(folder, self.tokenizer) if folder.exists() else None

    def require_rows(self, corpus_bytes: int) -> None:
        """Raise DataError where a split does not fill one row of the longest context that a stage reads."""
        plan = self.plan
        context = max(phase.context for phase in (plan.pretrain, *plan.extend, plan.instruct, plan.distil))
        for split in ("teacher", "student", "heldout"):
            parts = [self.shards(split), self.shards(f"{split}-parallel")]
            n_tokens = max(shards.n_tokens for shards in parts if shards is not None)
            if n_tokens <= context:
                wanted = round(1.5 * corpus_bytes * context / n_tokens, -3)
                raise DataError(
                    f"{corpus_bytes:,} bytes of text are too few: its {split} part has {n_tokens:,} tokens, and a row "
                    f"of training has {context:,}; give at least about {wanted:,.0f} bytes"
                )

    def filler(self, split: str) -> Shards:
        """Running text for needles: the split's main shards, or its parallel ones where it has no others."""
        found = self.shards(split) or self.shards(f"{split}-parallel")
        if found is None:
            raise DataError(f"{self.folder}: no tokens of the {split} split; delete the run and start again")
        return found

    def text(self, split: str, context: int, seed: int, *, documents: bool = False) -> Stream:
        """Running text of a split with its share of parallel sentences."""
        parts = [self.shards(split), self.shards(f"{split}-parallel")]
        streams = [
            TokenStream(shards, context, seed, documents=documents)
            for shards in parts
            if shards is not None and shards.n_tokens > context
        ]
        if len(streams) < 2:
            return streams[0]
        return MixStream(streams, [1 - PARALLEL_SHARE, PARALLEL_SHARE], seed)

    def retrieval(self, context: int) -> RetrievalStream:
        """Text with facts hidden in it and asked for at the end: as many as the context holds, up to eight."""
        n_facts = max(2, min(8, context // 128))
        maker = NeedleMaker(self.tokenizer, self.filler("teacher"))
        return RetrievalStream(
            maker, context, self.plan.seed, n_facts=n_facts, n_questions=max(1, n_facts * 3 // 4)
        )

    def pretraining(self, context: int) -> Stream:
        """What the teacher begins with: text, and some rows that teach it to look back and copy."""
        seed = self.plan.seed
        streams: list[Stream] = [self.text("teacher", context, seed), self.retrieval(context)]
        streams.append(RepetitionStream(self.tokenizer.n_ranks, context, seed))
        return MixStream(
            streams, [1 - RETRIEVAL_SHARE - REPETITION_SHARE, RETRIEVAL_SHARE, REPETITION_SHARE], seed
        )

    def dialogs(self, seed: int, context: int, n: int) -> DialogStream:
        """``n`` training dialogs made by program, rendered and packed."""
        dialogs = islice(stream_dialogs(seed, split="train"), n)  # one at a time: so many take a gigabyte
        rendered = (render_dialog(dialog, self.tokenizer) for dialog in dialogs)
        return DialogStream(rendered, context, seed, pad_id=self.tokenizer.pad_id)

    def instruct(self, context: int) -> Stream:
        """Dialogs with a little replayed text: what instruct tuning trains on."""
        seed = self.plan.seed
        dialogs = self.dialogs(seed, context, self.plan.n_dialogs)
        parts = [dialogs, self.text("teacher", context, seed + 7, documents=True)]
        return MixStream(parts, [1 - REPLAY_SHARE, REPLAY_SHARE], seed)

    @property
    def n_lessons(self) -> int:
        """Dialogs that a student reads: enough that none comes twice."""
        return min(self.plan.n_dialogs, math.ceil(self.plan.distil.tokens * DIALOG_SHARE / SHORT_DIALOG))

    def student(self, context: int) -> Stream:
        """Text no teacher saw and other dialogs, none twice: what student and control train on, in the same order."""
        seed = self.plan.seed + STUDENT_SEED
        parts = [
            self.text("student", context, seed, documents=True),
            self.dialogs(seed, context, self.n_lessons),
        ]
        return MixStream(parts, [1 - DIALOG_SHARE, DIALOG_SHARE], seed)


def render_dialog(dialog: Dialog, tokenizer: Tokenizer) -> Rendered:
    """A dialog as the model is trained on it."""
    return render(
        list(dialog.messages),
        tokenizer,
        tools=list(dialog.tools) or None,
        tool_call_format=dialog.tool_call_format,
    )


def bytes_per_token(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, float]:
    """UTF-8 bytes a token holds on held-out text, by language; higher is shorter."""
    sums: dict[str, list[int]] = {}
    texts = corpus.splits["heldout"]
    for document, ids in zip(texts, tokenizer.encode_batch([d.text for d in texts]), strict=True):
        entry = sums.setdefault(document.lang or "text", [0, 0])
        entry[0] += document.n_bytes
        entry[1] += len(ids)
    return {lang: n_bytes / n_tokens for lang, (n_bytes, n_tokens) in sorted(sums.items())}
