"""The same text in many languages: bits per byte by language, and the amount of text in a context window.

Unlike loss per token, bits per byte can be compared between tokenizers. All languages have the same content.
So the number of English words per window shows how long a text may be in each language.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...data.builtin import read_parallel
from ...data.corpus import split_of
from ...report.languages import in_order
from ..score import Score
from .data import Data
from .task import Answer, Item, Judgement, Read, Task, grouped_ratio

if TYPE_CHECKING:
    from ..results import ItemResult

LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja", "zh")
LINES = 10  # sentences per document
WINDOW = 131_072


class ParallelText(Task):
    """Bits per byte over all languages, with a breakdown by language. Less is better.

    Without data, the texts are the project's own parallel sentences, which `herd raise` holds out. ``folder``
    of the data has one text per language.
    """

    metric = "bpb"
    folder: ClassVar[str]

    def items(self, data: Data) -> list[Item]:
        texts = _own() if data.builtin else self._texts(data)
        blocks = {
            lang: ["\n".join(lines[i : i + LINES]) + "\n" for i in range(0, len(lines), LINES)]
            for lang, lines in texts.items()
        }
        numbered = [(lang, n) for n in range(max(map(len, blocks.values()))) for lang in in_order(blocks)]
        return [
            Item(f"{lang}-{n}", Read(text), None, lang, {"text": text, "english": _words(blocks, n)})
            for lang, n in numbered
            for text in blocks[lang][n : n + 1]
        ]

    def note(self, data: Data) -> str:
        return "the project's own held-out sentences" if data.builtin else ""

    def judge(self, item: Item, answer: Answer) -> Judgement:
        likelihood, text = answer.likelihoods[0], item.doc["text"]
        bits, n_bytes = -likelihood.nats / math.log(2), len(text.encode())
        metrics = {
            "bits": bits,
            "bytes": n_bytes,
            "tokens": likelihood.n_tokens,
            "words": len(text.split()),
            "english_words": item.doc["english"],
        }
        return Judgement(bits / n_bytes, metrics=metrics)

    def scores(self, results: Sequence[ItemResult]) -> list[Score]:
        known = [result for result in results if result.metrics.get("tokens")]
        ratios = [grouped_ratio("bpb", "bits/byte", known, "bits", "bytes", 1)]
        if known:
            ratios += [
                grouped_ratio("english_words_per_128k", "words", known, "english_words", "tokens", WINDOW),
                grouped_ratio("words_per_128k", "words", known, "words", "tokens", WINDOW),
                grouped_ratio("bytes_per_token", "bytes", known, "bytes", "tokens", 1),
            ]
        return ratios

    def _texts(self, data: Data) -> dict[str, list[str]]:
        there = [lang for lang in LANGUAGES if data.find(f"{self.folder}/{lang}.txt")]
        return {lang: _lines(data.text(f"{self.folder}/{lang}.txt")) for lang in there or LANGUAGES[:1]}


class Sentences(ParallelText):
    """A thousand sentences of news and Wikipedia."""

    source = "universaldependencies.org, Parallel Universal Dependencies"
    licence = "CC BY-SA"
    folder = "ud_pud_parallel"


class Declaration(ParallelText):
    """The Universal Declaration of Human Rights."""

    source = "unicode.org/udhr"
    licence = "public"
    folder = "udhr"


def _own() -> dict[str, list[str]]:
    """Return the held-out lines of the project's own sentences, by language."""
    texts: dict[str, list[str]] = {}
    for document in read_parallel():
        if split_of(document.source) == "heldout":
            texts.setdefault(document.lang, []).extend(_lines(document.text))
    return texts


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _words(blocks: dict[str, list[str]], n: int) -> int:
    """Return the number of words in the English block with this number, or 0 if there is none."""
    return len(blocks["en"][n].split()) if "en" in blocks and n < len(blocks["en"]) else 0
