"""Find the choice that an answer names, by its letter or by its text.

A letter counts if it cannot be a word or part of one: stated ("the answer is B"), at the beginning of a line
("B. because") or marked ("(B)", "option B"). The text of a choice counts in the same positions, and anywhere
if it is too long to occur by chance. Denied choices do not count. An answer that names two choices names
none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

_MARKUP = re.compile(r"\\(?:text|math)\w*(?=\{)|\\[()\[\]]|\*\*|__|[`$]|</?(?:b|strong|i|em|u)>")
_WORD = r"[^\W\u0e00-\u0e7f\u3040-\u9fff]"  # Thai, Japanese and Chinese have no spaces between words
_LETTER = re.compile(rf"(?<!{_WORD})(?<!['+#&.-])[A-Za-z](?!{_WORD}|['+#&-]|\.\w|\s*=)")
_OPENING, _CLOSING = " \n\"'([{:*>–-", "\"')]}*"
_STATED = re.compile(
    unicodedata.normalize(  # like the text
        "NFKC", r"(?:答案|答え|正解|คำตอบ)[^\d\n]{0,8}$|(?:[选選][择擇項项]?|ข้อ|उत्तर(?: है)?)$|"
    )
    + r"\b(?:answer|choice|option|letter|correct|right|best|antwort|richtige?|respuesta"
    r"|correcta|réponse|risposta|resposta|ответ|jibu)"
    r"\b[^.!?\n]{0,40}?"
    r"\b(?:is|be|was|ist|lautet|es|est|è|é|é a|ni)"
    r"(?: (?:the|option|choice|letter|answer|la|die|opción|probably|clearly|definitely|therefore|likely"
    r"|most))*$"
    r"|\b(?:answer|correct|selected|antwort|lösung|respuesta|réponse|risposta|resposta|ответ|jibu)"
    r"(?: option| choice| letter)?$",
    re.IGNORECASE,
)
_RIGHT_AFTER = re.compile(
    r" (?:is|was|seems|must be|would be|ist|est|es) (?:the |clearly |definitely |most |la |die )*"
    r"(?:correct|right|best|true|likely|answer|richtig|respuesta|réponse)",
    re.IGNORECASE,
)
_MARKED = re.compile(
    r"(?:\b(?:option|opción|opção|choice|letter|so|therefore|thus|hence|but|it is|it's|must be|choose|chose"
    r"|pick|select|say|go with|definitely|probably|clearly)"
    r"(?: (?:it is|it's|the|option|choice|letter|definitely|probably|clearly))*,?|=)$",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|than|instead of|nicht|kein|weder|noch|no es|pas|не)|n't)"
    r"(?: (?:be|the|option|choice|answer|letter|likely|really|equal to))*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[.:]? (?:(?:is|are|was|can|could|would|does|seems|must|ist|est|es)(?: be)?(?: \w+)? )?"
    r"(?:\w+n't|not|cannot|wrong|incorrect|false|impossible|nicht|falsch|pas)\b",
    re.IGNORECASE,
)
_NO_WORD_AFTER = re.compile(
    r"[ .]*(?:$|[,;:!?\n/—–-]|\. |\b(?:because|since|as|is|was|isn't|cannot|can't|for|due|which|would"
    r"|seems|and|or)\b)"
)
_JOINED = re.compile(
    r"[\"')]*\s*(?:,|/|&|\b(?:and|or|und|oder|et|ou|y|o|и|или)\b)\s*"
    r"(?:the |option |choice |maybe |possibly |perhaps )*[\"'(]*"
)
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_CORRECTED = re.compile(r"\b(?:actually|wait|correction)\b[^.!?\n]*$", re.IGNORECASE)
_SENTENCE_BEFORE, _NOTHING_AFTER = re.compile(r"\w\w[.!?] $"), re.compile(r"[.!]?\s*(?:\n|$)")
"""The surroundings of a choice that is a sentence by itself."""
_UNSURE = re.compile(
    r"\b(?:do not|don't) know\b|\bnot (?:sure|certain)\b|\bcannot (?:be|say|tell|determine)", re.I
)


@dataclass(frozen=True)
class _Mention:
    """A choice named in a text. ``strength`` 3: stated, 2: at the beginning of a line, 1: marked or long."""

    choice: int
    start: int
    end: int
    strength: int = 0
    denied: bool = False
    joined: bool = False
    """It is in a list with another choice: "A or B"."""


def chosen_letter(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that an answer commits to, or None.

    ``letters[i]`` means ``choices[i]``.
    """
    text = _plain(text)
    bare = [_bare(choice) for choice in choices]
    said = _ARTICLE.sub("", _bare(text))
    whole = [i for i, c in enumerate(bare) if _ARTICLE.sub("", c) == said and not _is_letter(c)]
    if len(whole) == 1:
        return letters[whole[0]]
    mentions = [_weighed(text, mention) for mention in _mentions(text, letters, bare)]
    mentions = [mention for mention in mentions if not mention.denied]
    for one, other in pairwise(mentions):
        if one.choice != other.choice and _JOINED.fullmatch(text, one.end, other.start):
            mentions = [replace(m, joined=True) if m in (one, other) else m for m in mentions]
    for strength in (3, 2, 1):
        found = [mention for mention in mentions if mention.strength == strength]
        if strength == 3:
            found = found[-1:]  # a later statement corrects an earlier one
        elif strength == 1 and _UNSURE.search(text):
            return None
        if found:
            agreed = len({mention.choice for mention in found}) == 1 and not any(m.joined for m in found)
            return letters[found[0].choice] if agreed else None
    return None


def _mentions(text: str, letters: str, choices: Sequence[str]) -> list[_Mention]:
    """Return the mentions of choices in order, without those inside a longer one."""
    found = list(_letters(text, letters))
    for number, choice in enumerate(choices):
        if choice and choice in text.casefold() and not _is_letter(choice):
            pattern = rf"(?<!{_WORD})(?<![.-]){re.escape(choice)}(?!{_WORD}|[.,]\d|\s*[-+*/=^×÷]\s*[\w(])"
            found += [_Mention(number, *match.span()) for match in re.finditer(pattern, text, re.IGNORECASE)]
    return sorted(
        (m for m in found if not any(o.start <= m.start and m.end <= o.end and _longer(o, m) for o in found)),
        key=lambda mention: mention.start,
    )


def _letters(text: str, letters: str) -> Iterator[_Mention]:
    for match in _LETTER.finditer(text):
        number = letters.find(match[0].upper())
        closed = text[match.end() :].lstrip(_CLOSING)
        # "a" and "I" are words of English, "e" and "y" of Spanish
        word = match[0] in "AI" or match[0].islower()
        if number >= 0 and (not word or closed != text[match.end() :] or _NO_WORD_AFTER.match(closed)):
            yield _Mention(number, *match.span())


def _weighed(text: str, mention: _Mention) -> _Mention:
    opened, closed = text[: mention.start], text[mention.end :]
    before, after = opened.rstrip(_OPENING), closed.lstrip(_CLOSING)
    denied = _DENIED_BEFORE.search(before) or (_DENIED_AFTER.match(after) and not _RIGHT_AFTER.match(after))
    wrapped = opened.endswith(("(", "[", "{", '"')) and closed != after
    alone = _SENTENCE_BEFORE.search(opened) and _NOTHING_AFTER.match(after)
    if _STATED.search(before) or _RIGHT_AFTER.match(after):
        strength = 3
    elif not re.search(r"\w", opened.rpartition("\n")[2]):
        strength = 2
    elif _MARKED.search(before) and _CORRECTED.search(opened):
        strength = 3
    elif wrapped or _MARKED.search(before) or alone:
        strength = int(wrapped or mention.end - mention.start > 1 or not text[mention.start].islower())
    else:
        strength = int(mention.end - mention.start >= 4)
    return replace(mention, strength=strength, denied=bool(denied))


def _longer(one: _Mention, other: _Mention) -> bool:
    return one.end - one.start > other.end - other.start


def _is_letter(choice: str) -> bool:
    return len(choice) == 1 and choice.isalpha()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("’‘“”„", '\'\'"""'))
    return _MARKUP.sub("", text.replace("\\boxed", "\nanswer: ")).strip()


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", _plain(text)).strip(" \"'.,;:!?*").casefold()
