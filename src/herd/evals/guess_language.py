"""Guess the language of a sentence from its letters and function words.

The script decides most cases. Languages that share a script are distinguished by letters that only one of
them has, then by function words. This is enough to check whether an answer is in the requested language
(IFEval). It is not meant for single words. For mixtures it returns the language of the larger part.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from ..package_yaml import package_yaml

_TABLES = package_yaml(__package__, "languages.yaml")
SCRIPTS: dict[str, str] = _TABLES["scripts"]
"""Languages by script: the first word of a Unicode character's name, for scripts of a single language."""
OWN_LETTERS: dict[str, dict[str, str]] = _TABLES["letters"]
"""By script: letters that occur in only one of its languages, the most certain language first."""
WORDS: dict[str, dict[str, str]] = _TABLES["words"]
"""By script: function words of its languages."""
LEAST_SHARE = 0.05
"""Smallest share of some texts that a language must have. Single texts are mistaken for another language."""

_WORD = re.compile(r"[^\W\d_]+(?:[\u0300-\u036f\u0900-\u0903\u093a-\u094f]+[^\W\d_]*)*")


def guess_language(text: str) -> str:
    """Return the ISO 639-1 code of the most likely language, or "" if the text has no letters."""
    scripts = Counter(script_of(letter) for letter in text if letter.isalpha())
    if not scripts:
        return ""
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * scripts.total():
        return "ja"  # some Japanese texts consist mostly of Chinese characters
    script = scripts.most_common(1)[0][0]
    if script in OWN_LETTERS:
        return _by_letters(text, OWN_LETTERS[script])
    return _by_words(text, WORDS[script]) if script in WORDS else SCRIPTS.get(script, "")


def languages_in(texts: Iterable[str]) -> set[str]:
    """Return the languages of at least `LEAST_SHARE` of the texts."""
    found = Counter(map(guess_language, texts))
    return {language for language, n in found.items() if n >= LEAST_SHARE * found.total()}


def _by_letters(text: str, letters: dict[str, str]) -> str:
    counts = Counter(text.lower())
    hits = {language: sum(counts[letter] for letter in own) for language, own in letters.items()}
    first = next(iter(hits))  # its letters occur in no other language of the script
    return first if hits[first] * 20 > counts.total() ** 0.5 else max(hits, key=hits.__getitem__)


def _by_words(text: str, languages: dict[str, str]) -> str:
    words = Counter(_WORD.findall(unicodedata.normalize("NFC", text.lower())))
    hits = {code: sum(words[word] for word in listed.split()) for code, listed in languages.items()}
    return max(hits, key=hits.__getitem__)


def script_of(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ", 1)[0] if letter > "\x7f" else "LATIN"
