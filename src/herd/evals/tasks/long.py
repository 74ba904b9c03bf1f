"""Long contexts: needles by length and depth, and the other kinds of RULER's texts (`herd.evals.ruler`).

The length of a text depends on the model's tokenizer, and the longest text on its context. So these tasks are
fitted to a model before they run (`fitted`): they use the lengths from 4k to 128k tokens that fit in the
context. For a context below 4k they use a quarter, a half and all of it, without lengths that are too short
for the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from .. import ruler
from ..ruler import CALM, Maker, Passage, share_found
from ..score import Score
from .data import Data
from .task import Answer, Generate, Item, Judgement, Task

if TYPE_CHECKING:
    from ..results import ItemResult

LENGTHS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PER_LENGTH = 20
CHAT_TOKENS = 40  # most tokens of a dialog's headers
LONG_TASKS = {"needle_single": "single", "needle_multi": "multiquery"} | {
    f"ruler_{kind}": kind for kind in ruler.KINDS if kind not in ("single", "multiquery")
}
"""The kind of text of every task."""
ANSWER_TOKENS = {
    "common_words": 120,
    "variables": 60,
    "multivalue": 60,
    "multiquery": 60,
    "frequent_words": 60,
}
TEXTS = ("long/text.txt", "wikitext2/test.txt", "tinyshakespeare/input.txt")
_SENTENCE = re.compile(r"(?<=[.!?]) |\n")


def bytes_as_tokens(text: str) -> int:
    """Return an estimate of the number of tokens, four bytes each, for models without a known tokenizer."""
    return (len(text.encode()) + 3) // 4


@dataclass(frozen=True)
class LongText(Task):
    """``PER_LENGTH`` texts of every length, at all depths in turn. The value is the fraction found.

    Facts are hidden in text of the data folder if it has any, else in lines without content.
    """

    source = "Hsieh et al., RULER, arXiv 2404.06654"
    licence = "made for the project"
    metric = "found"
    lengths: tuple[int, ...] = LENGTHS
    count: Callable[[str], int] = field(default=bytes_as_tokens, repr=False, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"lengths": list(self.lengths), "per_length": PER_LENGTH}

    @property
    def kind(self) -> str:
        """The kind of text, a name in `ruler`."""
        return LONG_TASKS[self.name]

    def fitted(self, model: Any) -> Task:
        context, count = getattr(model, "context", None), getattr(model, "count", None)
        within = tuple(n for n in LENGTHS if context is None or n <= context)
        if context is not None and not within:
            within = tuple(context // part for part in (4, 2, 1) if context // part >= 128)
        return replace(self, lengths=within, count=lru_cache(maxsize=1 << 16)(count or bytes_as_tokens))

    def items(self, data: Data) -> list[Item]:
        maker = self._maker(data)
        held = [length for length in self.lengths if not self._too_short(maker, length)]
        if not held:
            longest = max(self.lengths, default=0)
            why = self._too_short(maker, longest)
            raise DataError(
                f"a context of {longest:,} tokens is too short for this task ({why}); "
                "use a model with a longer context"
            )
        return [self._item(maker, length, n) for n in range(PER_LENGTH) for length in held]

    def note(self, data: Data) -> str:
        text = "the data folder's text" if data.find(*TEXTS) else "the built-in lines"
        maker = self._maker(data)
        held = [length for length in self.lengths if not self._too_short(maker, length)]
        return f"in {text}; lengths {', '.join(f'{n:,}' for n in held)} tokens"

    def judge(self, item: Item, answer: Answer) -> Judgement:
        return Judgement(share_found(item.doc["found"], answer.text), answer.text.strip()[:200])

    def scores(self, results: Sequence[ItemResult]) -> list[Score]:
        """Add a grid of length and depth, for the heat map."""
        places = [(int(length), float(depth)) for length, depth, _ in (r.id.split("/") for r in results)]
        grid = ruler.length_depth_grid(places, [result.value for result in results])
        first, *others = super().scores(results)
        return [replace(first, detail=first.detail | {"grid": grid}), *others]

    def _maker(self, data: Data) -> Maker:
        return Maker(self.count, _lines(data), _passages(data) if self.kind == "questions" else ())

    def _too_short(self, maker: Maker, length: int) -> str:
        """Return the reason why a length is too short for the question (in short contexts), or ""."""
        try:
            for n in range(PER_LENGTH if length < LENGTHS[0] else 0):
                self._item(maker, length, n)
        except DataError as error:
            return str(error)
        return ""

    def _item(self, maker: Maker, length: int, n: int) -> Item:
        room, depth = ANSWER_TOKENS.get(self.kind, 30), DEPTHS[n % len(DEPTHS)]
        found = maker.make(self.kind, length - room - CHAT_TOKENS, depth, n)
        prompt: Any = found.prompt
        if self.mode == "instruct":
            prompt = ({"role": "user", "content": f"{found.text}\n\n{found.question}"},)
        stop = ("\n",) if self.mode == "base" else ()
        request = Generate(prompt, max_tokens=room, stop=stop)
        return Item(
            f"{length}/{depth:.2f}/{n}", request, list(found.expected), f"{length:,}", {"found": found}
        )


def _lines(data: Data) -> Sequence[str]:
    """Return lines of running text to hide facts in, one sentence each."""
    if not data.find(*TEXTS):
        return CALM
    sentences = _SENTENCE.split(data.text(*TEXTS))
    return [" ".join(words) for sentence in sentences if len(words := sentence.split()) > 3]


def _passages(data: Data) -> list[Passage]:
    rows = data.rows("squad/validation.jsonl", "squad/dev.jsonl", needs=("context", "question", "answers"))
    return [
        Passage(row["context"], row["question"], tuple(dict.fromkeys(row["answers"]["text"]))) for row in rows
    ]
