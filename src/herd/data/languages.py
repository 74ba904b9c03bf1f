"""Recognize the languages of Herd's own sentences in other texts, by runs of three letters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from .builtin import LANGUAGES, parallel_lines

LEAST_SHARE = 0.05
"""Smallest share of the texts that a language must have. Single texts are mistaken for another language."""
_NO_LETTERS = re.compile(r"[\W\d_]+")


def languages_in(texts: Iterable[str]) -> set[str]:
    """Return the languages of Herd's sentences that texts of some hundred words are in.

    A text is counted for the language whose own runs of three letters, those that Herd's sentences have in
    no other language, it has most of. A text in a language that Herd has no sentences in counts for a
    similar one.
    """
    found: Counter[str] = Counter()
    for text in texts:
        hits = Counter(own for run in _runs(text) if (own := _own_runs().get(run)))
        found.update(language for language, _ in hits.most_common(1))
    return {language for language, n in found.items() if n >= LEAST_SHARE * found.total()}


@lru_cache(maxsize=1)
def _own_runs() -> dict[str, str]:
    """Return the language of every run of three letters that only one language has."""
    runs = {language: set(_runs(" ".join(parallel_lines(language)))) for language in LANGUAGES}
    times = Counter(run for of in runs.values() for run in of)
    return {run: language for language, of in runs.items() for run in of if times[run] == 1}


def _runs(text: str) -> list[str]:
    text = _NO_LETTERS.sub(" ", text.casefold())
    return [text[start : start + 3] for start in range(len(text) - 2)]
