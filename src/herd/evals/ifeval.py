"""IFEval: instructions that a program can check, from "at least 300 words" to "no commas".

Each of the 25 kinds is one small function of the answer. *Strict* takes the answer as it is. *Loose* also accepts it
without its first line, without its last, and without asterisks: politeness and markdown are forgiven.

The rules are those of the authors' checkers, except where theirs need a downloaded model: sentences and upper-case
words are counted by regular expressions here (`sentences`), and languages are told by `guess_language`.
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

Check = Callable[..., bool]
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
CHECKS: dict[str, Check] = {}
"""Kind of instruction (without a language's prefix) to its check: ``check(text, **kwargs)``."""

FOR_GOOD = ("punctuation:no_comma", "keywords:forbidden_words")
FOR_GOOD_IF_LESS = ("keywords:frequency", "keywords:letter_frequency")
"""Kinds that, once broken, stay broken however the text goes on; the latter those that want less than so many."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*(?=\s|$)")
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Inc|Ltd|Co)|\b[A-Z]|^\s*\d+)\.$", re.M
)
_WORD = re.compile(r"\w(?:[\w.&-]*\w)?")


def known(instruction: str) -> bool:
    """Whether an instruction's id, e.g. ``punctuation:no_comma`` or ``en:punctuation:no_comma``, can be checked."""
    return _kind(instruction) in CHECKS


def follows(instruction: str, text: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether ``text``, as it is, follows one instruction; an empty one follows none. DataError for an unknown id."""
    if not known(instruction):
        raise DataError(f"unknown instruction {instruction!r}: known are {', '.join(sorted(CHECKS))}")
    given = {name: value for name, value in kwargs.items() if value is not None}
    return bool(text.strip()) and CHECKS[_kind(instruction)](text, **given)


def strict(instructions: Sequence[str], text: str, kwargs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which instructions the answer follows."""
    return [follows(name, text, given) for name, given in zip(instructions, kwargs, strict=True)]


def loose(instructions: Sequence[str], text: str, kwargs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which ones it follows in at least one of its eight `forgiven` forms."""
    forms = forgiven(text)
    return [
        any(follows(name, form, given) for form in forms)
        for name, given in zip(instructions, kwargs, strict=True)
    ]


def forgiven(text: str) -> list[str]:
    """With and without its first line, its last line, and asterisks."""
    lines = text.split("\n")
    cut = ["\n".join(lines[a:b]) for a, b in ((0, None), (1, None), (0, -1), (1, -1))]
    shorter = [text, *(part.strip() for part in cut[1:])]
    return [part.replace("*", "") if bare else part for part, bare in product(shorter, (False, True))]


def contradictions(instructions: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The instructions that no answer can follow, because the prompt that is to be repeated first breaks them already.

    An answer begins with that prompt, capitals aside, and these kinds are broken for good by a beginning: a comma, a
    forbidden word or a word too many cannot be taken back by what comes after ("x": nor by growing the last word).
    """
    beginnings = [given["prompt_to_repeat"].strip() + "x" for name, given in zip(instructions, kwargs, strict=True)
                  if _kind(name) == "combination:repeat_prompt"]  # fmt: skip
    return [
        name
        for name, given in zip(instructions, kwargs, strict=True)
        if (_kind(name) in FOR_GOOD or (_kind(name) in FOR_GOOD_IF_LESS and "less than" in given.values()))
        and not all(follows(name, text, given) for text in beginnings)
    ]


def sentences(text: str) -> list[str]:
    """Cut after . ! ? before white space; not after common abbreviations, initials and numbers that begin a line."""
    out, start = [], 0
    for found in _SENTENCE_END.finditer(text):
        piece = text[start : found.end()]
        if piece.strip() and not _NO_END.search(text[max(start, found.start() - 80) : found.start()]):
            out.append(piece.strip())
            start = found.end()
    return [*out, text[start:].strip()] if text[start:].strip() else out


def capital_words(text: str) -> list[str]:
    """Words without a lower-case letter; "A" and "I" are some."""
    return [word for word in _WORD.findall(text) if word.isupper()]


def _kind(instruction: str) -> str:
    return re.sub(r"^[a-z]{2}:", "", instruction)


def _enough(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise DataError(f"unknown relation {relation!r}: at least, or less than")
    return count >= wanted if relation == "at least" else count < wanted


def _check(kind: str) -> Callable[[Check], Check]:
    def keep(function: Check) -> Check:
        CHECKS[kind] = function
        return function

    return keep


@_check("change_case:capital_word_frequency")
def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _enough(len(capital_words(text)), capital_relation, capital_frequency)


@_check("change_case:english_capital")
def _english_capital(text: str) -> bool:
    return text.isupper() and guess_language(text) == "en"


@_check("change_case:english_lowercase")
def _english_lowercase(text: str) -> bool:
    return text.islower() and guess_language(text) == "en"


@_check("combination:repeat_prompt")
def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_check("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_check("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    usual = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return (
        re.search(usual.get(postscript_marker, re.escape(postscript_marker.lower())), text.lower())
        is not None
    )


@_check("detectable_format:constrained_response")
def _constrained_response(text: str) -> bool:
    return any(option in text for option in OPTIONS)


@_check("detectable_format:json_format")
def _json_format(text: str) -> bool:
    bare = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


@_check("detectable_format:multiple_sections")
def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    """``*so*`` or ``**so**``, within a line."""
    single = [part.strip("*").strip() for part in re.findall(r"\*[^\n*]*\*", text)]
    double = [part[2:-2].strip() for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(map(bool, single + double)) >= num_highlights


@_check("detectable_format:title")
def _title(text: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


@_check("keywords:existence")
def _keywords(text: str, keywords: Sequence[str]) -> bool:
    return all(_count(keyword, text) for keyword in keywords)


@_check("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@_check("keywords:frequency")
def _keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _enough(_count(keyword.strip(), text), relation, frequency)


@_check("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _enough(text.lower().count(letter.lower()), let_relation, let_frequency)


@_check("language:response_language")
def _language(text: str, language: str) -> bool:
    return guess_language(text) in ("", language)


@_check("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are apart by an empty line; empty ones do not count, but take a place."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


@_check("length_constraints:number_paragraphs")
def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are apart by ``***``; an empty one is allowed at either end only."""
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


@_check("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _enough(len(sentences(text)), relation, num_sentences)


@_check("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _enough(len(re.findall(r"\w+", text)), relation, num_words)


@_check("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


@_check("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_check("startend:quotation")
def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _count(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))
