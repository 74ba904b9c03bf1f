"""IFEval: check instructions such as "at least 300 words" or "no commas".

Each of the 25 kinds is one function of the answer (`CHECKS`). *Strict* checks the whole answer. *Loose* also
accepts it without its first line, without its last line or without asterisks. This allows polite phrases and
Markdown.

The rules equal those of the authors' checkers, except for those that need a downloaded model: here regular
expressions count sentences and upper-case words (`sentences`), and `guess_language` recognizes languages.
Source: Zhou et al., arXiv 2311.07911.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from ..errors import DataError
from .guess_language import guess_language

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
BULLETS = (r"^\s*\*[^*].*$", r"^\s*-.*$")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}

BROKEN_FOR_GOOD = ("punctuation:no_comma", "keywords:forbidden_words")
BROKEN_BY_TOO_MANY = ("keywords:frequency", "keywords:letter_frequency")
"""Kinds that no continuation of a text can repair, if they demand fewer than a number of occurrences."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*(?=\s|$)")
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Inc|Ltd|Co)|\b[A-Z]|^\s*\d+)\.$", re.M
)
_WORD = re.compile(r"\w(?:[\w.&-]*\w)?")


def follows(instruction: str, text: str, kwargs: Mapping[str, Any]) -> bool:
    """Return whether ``text`` follows an instruction such as ``punctuation:no_comma``.

    An empty text follows none.
    """
    check = CHECKS.get(_kind(instruction))
    if check is None:
        raise DataError(f"unknown instruction {instruction!r}: known are {', '.join(sorted(CHECKS))}")
    return bool(text.strip()) and check(
        text, **{name: value for name, value in kwargs.items() if value is not None}
    )


def strict(instructions: Sequence[str], text: str, kwargs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each instruction whether the answer follows it."""
    return [follows(name, text, given) for name, given in zip(instructions, kwargs, strict=True)]


def loose(instructions: Sequence[str], text: str, kwargs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each instruction whether one of the answer's eight `forgiven` forms follows it."""
    followed = [strict(instructions, form, kwargs) for form in forgiven(text)]
    return [any(each) for each in zip(*followed, strict=True)]


def forgiven(text: str) -> list[str]:
    """Return the eight forms of a text with and without its first line, its last line, and asterisks."""
    lines = text.split("\n")
    cut = ["\n".join(lines[a:b]) for a, b in ((0, None), (1, None), (0, -1), (1, -1))]
    shorter = [text, *(part.strip() for part in cut[1:])]
    return [part.replace("*", "") if bare else part for part, bare in product(shorter, (False, True))]


def contradictions(instructions: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the instructions that no answer can follow, because the prompt that it must repeat breaks them.

    The answer must begin with this prompt, and the following text cannot undo a comma, a forbidden word or a
    word too many. (The "x" shows that a longer last word does not help either.)
    """
    pairs = list(zip(instructions, kwargs, strict=True))
    repeated = [
        given["prompt_to_repeat"] for name, given in pairs if _kind(name) == "combination:repeat_prompt"
    ]
    beginnings = [f"{prompt.strip()}x" for prompt in repeated]
    return [
        name
        for name, given in pairs
        if _kind(name) in BROKEN_FOR_GOOD + BROKEN_BY_TOO_MANY * ("less than" in given.values())
        and not all(follows(name, text, given) for text in beginnings)
    ]


def sentences(text: str) -> list[str]:
    """Split a text after . ! ? before white space, but not after abbreviations, initials and list numbers."""
    out, start = [], 0
    for found in _SENTENCE_END.finditer(text):
        piece = text[start : found.end()]
        if piece.strip() and not _NO_END.search(text[max(start, found.start() - 80) : found.start()]):
            out.append(piece.strip())
            start = found.end()
    return [*out, text[start:].strip()] if text[start:].strip() else out


def capital_words(text: str) -> list[str]:
    """Return the words without a lower-case letter, among them "A" and "I"."""
    return [word for word in _WORD.findall(text) if word.isupper()]


def _kind(instruction: str) -> str:
    return re.sub(r"^[a-z]{2}:", "", instruction)


def _enough(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise DataError(f"unknown relation {relation!r}: use 'at least' or 'less than'")
    return count >= wanted if relation == "at least" else count < wanted


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _postscript(text: str, postscript_marker: str) -> bool:
    pattern = POSTSCRIPTS.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, text.lower()) is not None


def _json_format(text: str) -> bool:
    bare = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _highlights(text: str, num_highlights: int) -> bool:
    """Return whether there are enough highlights, ``*like this*`` or ``**like this**``, within a line."""
    single = [part.strip("*").strip() for part in re.findall(r"\*[^\n*]*\*", text)]
    double = [part[2:-2].strip() for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(map(bool, single + double)) >= num_highlights


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Compare the first word of a paragraph. Empty paragraphs are numbered but do not count."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Count paragraphs separated by ``***``. Only the first and the last may be empty."""
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _count(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _enough(
        len(capital_words(text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper() and guess_language(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and guess_language(text) == "en",
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text: any(option in text for option in OPTIONS),
    "detectable_format:json_format": _json_format,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        sum(len(re.findall(mark, text, re.MULTILINE)) for mark in BULLETS) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": lambda text: any(
        found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text)
    ),
    "keywords:existence": lambda text, keywords: all(_count(keyword, text) for keyword in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:frequency": lambda text, keyword, frequency, relation: _enough(
        _count(keyword.strip(), text), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _enough(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: guess_language(text) in ("", language),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _enough(
        len(sentences(text)), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _enough(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": _quotation,
}
"""The check of every kind of instruction, by its name without a language prefix."""
