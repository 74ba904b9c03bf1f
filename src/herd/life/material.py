"""The data of a run, opened from its folder: tokenizer, shards, dialogs and the stages' training streams."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.corpus import SPLITS, Corpus
from ..data.dialogs import stream_dialogs
from ..data.needle import NeedleMaker, RetrievalStream
from ..data.packing import DialogStream
from ..data.repetition import RepetitionStream
from ..data.shards import Shards
from ..data.sources import Document
from ..data.stream import MixStream, Stream, TokenStream
from ..errors import DataError
from ..text import Tokenizer, render
from .plan import Plan

PARALLEL_SHARE = 0.08
"""Share of rows that are parallel sentences: Llama 3's share of multilingual text (paper, section 3.1.2)."""
RETRIEVAL_SHARE, REPETITION_SHARE = 0.1, 0.15
"""Shares of pre-training rows that exercise copying. A small model learns it too slowly from text alone."""
REPLAY_SHARE = 0.22
"""Share of plain text in the rows of instruct tuning, so that the model does not forget how to write."""
DIALOG_SHARE = 0.4
"""Share of dialogs in the rows that a student learns from."""

SHORT_DIALOG = 64
"""Tokens of a short dialog. Most dialogs have about a hundred."""
DIALOG_NBYTES = 1_250
"""Bytes of memory of one rendered dialog that waits to be packed into a row."""

STUDENT_SEED = 1_000_003
"""Added to the plan's seed for the student's data, so that its dialogs and order differ from the teacher's.
"""


def is_parallel(document: Document) -> bool:
    return document.kind == "parallel"


def numbers() -> Iterator[str]:
    """Yield all numbers of up to three digits so often that each becomes one token, as in Llama 3."""
    line = " ".join(str(n) for n in range(1000))
    yield from (line for _ in range(200))


@dataclass(frozen=True)
class RaiseData:
    """The data of a run.

    Streams depend only on the run's folder and plan, so any stage can make them again.
    """

    plan: Plan
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def write_shards(self, split: str, documents: list[Document], tokenizer: Tokenizer) -> None:
        """Write ``data/SPLIT``, and ``data/SPLIT-parallel`` if there are parallel sentences."""
        for name, parallel in ((split, False), (f"{split}-parallel", True)):
            folder = self.folder / "data" / name
            shutil.rmtree(folder, ignore_errors=True)  # left over if this stage was interrupted
            if selected := [document for document in documents if is_parallel(document) == parallel]:
                Shards.write(folder, selected, tokenizer)

    def shards(self, name: str) -> Shards | None:
        """Open ``data/NAME``. Returns None if the corpus has no such text."""
        folder = self.folder / "data" / name
        return Shards.open(folder, self.tokenizer) if folder.exists() else None

    def shards_of(self, split: str) -> list[Shards]:
        """Open the shards of a split that exist: its main text, then its parallel sentences."""
        opened = [self.shards(split), self.shards(f"{split}-parallel")]
        return [shards for shards in opened if shards is not None]

    def require_rows(self, corpus_bytes: int) -> None:
        """Raise `DataError` if a split has fewer tokens than one row of the longest context of any stage."""
        plan = self.plan
        context = max(phase.context for phase in (plan.pretrain, *plan.extend, plan.instruct, plan.distil))
        for split in SPLITS:
            n_tokens = max(shards.n_tokens for shards in self.shards_of(split))
            if n_tokens <= context:
                wanted = round(1.5 * corpus_bytes * context / n_tokens, -3)
                raise DataError(
                    f"{corpus_bytes:,} bytes of text are too few: the {split} part has {n_tokens:,} tokens, "
                    f"but one training row has {context:,}; give at least about {wanted:,.0f} bytes"
                )

    def filler(self, split: str) -> Shards:
        """Open running text to hide needles in: the split's main shards, or else its parallel sentences."""
        return self.shards_of(split)[0]

    def text(self, split: str, context: int, seed: int, *, documents: bool = False) -> Stream:
        """Return the running text of a split mixed with its share of parallel sentences."""
        streams = [
            TokenStream(shards, context, seed, documents=documents)
            for shards in self.shards_of(split)
            if shards.n_tokens > context
        ]
        return streams[0] if len(streams) == 1 else mix_two(streams[0], streams[1], PARALLEL_SHARE, seed)

    def retrieval(self, context: int) -> RetrievalStream:
        """Return text with hidden facts (up to eight if there is room) and questions about them at its
        end."""
        n_facts = max(2, min(8, context // 128))
        n_questions = max(1, n_facts * 3 // 4)
        maker = NeedleMaker(self.tokenizer, self.filler("teacher"))
        return RetrievalStream(maker, context, self.plan.seed, n_facts=n_facts, n_questions=n_questions)

    def pretraining(self, context: int) -> Stream:
        """Return the rows of pre-training: text, and some rows that teach the model to look back and copy."""
        seed = self.plan.seed
        repeated = RepetitionStream(self.tokenizer.n_ordinary, context, seed)
        streams = [self.text("teacher", context, seed), self.retrieval(context), repeated]
        shares = [1 - RETRIEVAL_SHARE - REPETITION_SHARE, RETRIEVAL_SHARE, REPETITION_SHARE]
        return MixStream(streams, shares, seed)

    def dialogs(self, seed: int, context: int, n: int) -> DialogStream:
        """Return ``n`` synthetic training dialogs, rendered and packed."""
        # Rendered one at a time, because all of them as text would take a gigabyte.
        rendered = (
            render(d.messages, self.tokenizer, tool_call_format=d.tool_call_format)
            for d in islice(stream_dialogs(seed, split="train"), n)
        )
        return DialogStream(rendered, context, seed, pad_id=self.tokenizer.pad_id or 0)

    def instruct(self, context: int) -> Stream:
        """Return the rows of instruct tuning: dialogs with a little replayed text."""
        seed = self.plan.seed
        dialogs = self.dialogs(seed, context, self.plan.n_dialogs)
        text = self.text("teacher", context, seed + 7, documents=True)
        return mix_two(dialogs, text, REPLAY_SHARE, seed)

    @property
    def n_lessons(self) -> int:
        """The number of dialogs for a student: enough that none is repeated."""
        return min(self.plan.n_dialogs, math.ceil(self.plan.distil.tokens * DIALOG_SHARE / SHORT_DIALOG))

    def student(self, context: int) -> Stream:
        """Return the rows of student and control: text and dialogs that no teacher saw, without repeats."""
        seed = self.plan.seed + STUDENT_SEED
        text = self.text("student", context, seed, documents=True)
        return mix_two(text, self.dialogs(seed, context, self.n_lessons), DIALOG_SHARE, seed)


def mix_two(first: Stream, second: Stream, share: float, seed: int) -> MixStream:
    """Mix two streams. ``share`` is the fraction of rows from the second one."""
    return MixStream([first, second], [1 - share, share], seed)


def bytes_per_token(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the UTF-8 bytes per token of held-out text by language. Higher values mean fewer tokens."""
    sums: dict[str, list[int]] = {}
    texts = corpus.splits["heldout"]
    for document, ids in zip(texts, tokenizer.encode_batch([d.text for d in texts]), strict=True):
        entry = sums.setdefault(document.lang or "text", [0, 0])
        entry[0] += document.n_bytes
        entry[1] += len(ids)
    return {lang: n_bytes / n_tokens for lang, (n_bytes, n_tokens) in sorted(sums.items())}
