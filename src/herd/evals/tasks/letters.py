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

SURROUNDINGS = 200
"""Characters before and after a choice that decide what is said of it."""
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
    r"|\b(?:answer|correct|right|selected|antwort|lösung|respuesta|réponse|risposta|resposta|ответ|jibu)"
    r"(?: option| choice| letter)?$",
    re.IGNORECASE,
)
_RIGHT_AFTER = re.compile(
    r" (?:is|was|seems|must be|would be|ist|est|es) (?:the |clearly |definitely |most |la |die )*"
    r"(?:correct|right|best|true|likely|answer|richtig|respuesta|réponse)| ?[✓✔✅]",
    re.IGNORECASE,
)
_VERB_AFTER = re.compile(r" (?:is|was|does|did|would|remains|ist|est|es)(?=\s*(?:[.,;:!)]|$))", re.IGNORECASE)
"""A verb without more, which says of a choice what was denied of the one before: "A is not right; B is"."""
_ALSO_AFTER = re.compile(
    r" (?:is|was|does|would be|could be|might be|ist|est|es),? (?:(?:also|auch|aussi)\b"
    r"|(?:too|as well)(?=\s*(?:[.,;!]|$)))",
    re.IGNORECASE,
)
_MARKED = re.compile(
    r"(?:\b(?:option|opción|opção|choice|letter|so|therefore|thus|hence|but|sondern|sino|mais|ma|mas|а|но"
    r"|it is|it's|es|es ist|c'est|è|must be|choose|chose"
    r"|pick|select|say|go with|definitely|probably|clearly)"
    r"(?: (?:it is|it's|the|option|choice|letter|definitely|probably|clearly))*,?|=|是|选|選)$",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:(?:\b(?:not|never|cannot|hardly)|n't)"
    r"(?: (?:think|believe|say|choose|pick|select|go with|recommend|(?:true|the case|certain|likely) that))?"
    r"(?: that)?(?: (?:it|this|the (?:\w+ )?(?:answer|choice|option))(?:'s| is| was| would be))?"
    r"|\bneither(?: is| was| does| can)?"
    r"|\b(?:nor|except|than|instead of|unlike|as opposed to|nicht|kein|weder|noch|no es|no|pas|не"
    r"|anything but|all but|far from|no way|reject|avoid|eliminat(?:e|ed|ing)|rul(?:e|ed|ing) out"
    r"|exclud(?:e|ed|ing)|(?:false|untrue|wrong|incorrect) that|(?<!no )(?<!without )doubt"
    r"|(?:wrong|incorrect|worst) (?:answer|option|choice)s?(?: is| are| was| would be)?)|不是|不选|不選"
    r"|(?:^|[.!?;\n] *)(?:wrong|incorrect|false))"
    r"(?: (?:be|the|that|it is|it's|option|options|choice|choices|answer|answer is|letter|likely|really"
    r"|equal to))*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[.:]? (?:(?:is|are|was|were|can|could|would|does|seems|must|ist|est|es)(?: be)?(?: \w+)? )?"
    r"(?:\w+n't|not|cannot|never|hardly|barely|partly|partially|(?:wrong|incorrect|false)(?!:)|impossible"
    r"|ruled out|eliminated|excluded|unlikely|less|far from|doubtful|unclear|nicht|falsch|pas)\b"
    r"| ?[✗✘❌]|[^.,;:!?\n]{0,60}\?",
    re.IGNORECASE,
)
"""Words after a choice that deny it. A question does not choose either."""
_PLURAL_AFTER = re.compile(r" (?:are|were|aren't|weren't|do|don't|sind|son|sont)\b", re.IGNORECASE)
_NOT_ONLY = re.compile(r"\bnot (?:only|just|merely)(?: (?:the|option|choice))*$", re.IGNORECASE)
_NO_WORD_AFTER = re.compile(
    r"[ .]*(?:$|[,;:!?\n/—–-]|\. |\b(?:because|since|as|is|was|isn't|does|doesn't|cannot|can't|for|due|which"
    r"|would|seems|and|or|but|nor)\b)"
)
_JOINED = re.compile(
    r"[\"')]*\s*(?:[,/&]|,?\s*\b(?:or|oder|ou|или)\b|\b(?:and|und|et|y|o|и)\b)\s*"
    r"(?:the |option |choice |maybe |possibly |perhaps )*[\"'(]*"
)
_LIST_WORD = r"\b(?:and|or|nor|und|oder|noch|et|ou|ni|y|o|и|или)\b"
_LISTED = re.compile(rf"[\"')]*\s*(?:,|,?\s*(?P<word>{_LIST_WORD}))\s*[\"'(]*")
"""The text between two neighbours of a list, all of which a denial of its first or last one denies."""
_BOTH = re.compile(r"[^.!?;\n]*\b(?:and|or|und|oder|et|ou)\b[^.!?;\n]*")
_CONDITION = re.compile(r"\b(?:if|unless|whether)\b[^.!?\n]*$", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_CORRECTED = re.compile(r"\b(?:actually|wait|correction)\b[^.!?\n]*$", re.IGNORECASE)
_SENTENCE_BEFORE, _NOTHING_AFTER = re.compile(r"\w\w[.!?] $"), re.compile(r"[.!]?\s*(?:\n|$)")
"""The surroundings of a choice that is a sentence by itself."""
_UNSURE = re.compile(
    r"\b(?:do not|don't) know\b|\bnot (?:sure|certain)\b"
    r"|\bcannot (?:be (?:sure|certain|determined|known|said|told|answered)|say|tell|determine)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Mention:
    """A choice named in a text. ``strength`` 3: stated, 2: at the beginning of a line, 1: marked or long."""

    choice: int
    start: int
    end: int
    strength: int = 0
    denied: str = ""
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
    mentions = _denied_lists(text, [_weighed(text, mention) for mention in _mentions(text, letters, bare)])
    for number, (one, other) in enumerate(pairwise(mentions), start=1):
        is_verb = _VERB_AFTER.match(text, other.end) and not _CONDITION.search(_before(text, other))
        if one.denied and is_verb:
            mentions[number] = replace(other, strength=3)
    mentions = [mention for mention in mentions if not mention.denied]
    for one, other in pairwise(mentions):
        if one.choice != other.choice and _JOINED.fullmatch(text, one.end, other.start):
            mentions = [replace(m, joined=True) if m in (one, other) else m for m in mentions]
    for strength in (3, 2, 1):
        found = [mention for mention in mentions if mention.strength == strength]
        if strength == 3:  # a later statement corrects an earlier one, unless "and" joins them
            two = found[-2:]
            are_both = len(two) == 2 and _BOTH.fullmatch(text, two[0].end, two[1].start)
            found = two if are_both else found[-1:]
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


def _denied_lists(text: str, mentions: list[_Mention]) -> list[_Mention]:
    """Return the mentions, all of a list denied if it is as a whole: "not A or C", "A and C are wrong"."""
    runs: list[list[_Mention]] = []
    is_closed = True
    for mention in mentions:
        gap = None if not runs else _LISTED.fullmatch(text, runs[-1][-1].end, mention.start)
        if gap and (gap["word"] or not is_closed):
            runs[-1].append(mention)
        else:
            runs.append([mention])
        is_closed = bool(gap and gap["word"])
    out: list[_Mention] = []
    for run in runs:
        is_list = len(run) > 2 or (len(run) == 2 and re.search(_LIST_WORD, text[run[0].end : run[1].start]))
        as_a_whole = run[0].denied == "before" or (run[-1].denied and _PLURAL_AFTER.match(text, run[-1].end))
        whole = bool(is_list and as_a_whole)
        out += [replace(m, denied="list") if whole and m.strength < 3 else m for m in run]
    return out


def _letters(text: str, letters: str) -> Iterator[_Mention]:
    for match in _LETTER.finditer(text):
        number = letters.find(match[0].upper())
        following = text[match.end() : match.end() + SURROUNDINGS]
        closed = following.lstrip(_CLOSING)
        # "a" and "I" are words of English, "e" and "y" of Spanish
        word = match[0] in "AI" or match[0].islower()
        if number >= 0 and (not word or closed != following or _NO_WORD_AFTER.match(closed)):
            yield _Mention(number, *match.span())


def _weighed(text: str, mention: _Mention) -> _Mention:
    opened, closed = _before(text, mention), text[mention.end : mention.end + SURROUNDINGS]
    before, after = opened.rstrip(_OPENING), closed.lstrip(_CLOSING)
    denied_after = _DENIED_AFTER.match(after) and not _RIGHT_AFTER.match(after)
    denied = "before" if _DENIED_BEFORE.search(before) else "after" if denied_after else ""
    wrapped = opened.endswith(("(", "[", "{", '"')) and closed != after
    is_also = _ALSO_AFTER.match(after)
    is_one_of_two = _NOT_ONLY.search(before)
    alone = _SENTENCE_BEFORE.search(opened) and _NOTHING_AFTER.match(after)
    if is_also or _STATED.search(before) or _RIGHT_AFTER.match(after):
        strength = 3
    elif not re.search(r"\w", opened.rpartition("\n")[2]):
        strength = 2
    elif _MARKED.search(before) and _CORRECTED.search(opened):
        strength = 3
    elif wrapped or _MARKED.search(before) or alone or is_one_of_two:
        strength = int(wrapped or mention.end - mention.start > 1 or not text[mention.start].islower())
    else:
        strength = int(mention.end - mention.start >= 4)
    return replace(mention, strength=strength, denied=denied, joined=bool(is_also or is_one_of_two))


def _before(text: str, mention: _Mention) -> str:
    return text[max(0, mention.start - SURROUNDINGS) : mention.start]


def _longer(one: _Mention, other: _Mention) -> bool:
    return one.end - one.start > other.end - other.start


def _is_letter(choice: str) -> bool:
    return len(choice) == 1 and choice.isalpha()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("’‘“”„", '\'\'"""'))
    return _MARKUP.sub("", text.replace("\\boxed", "\nanswer: ")).strip()


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", _plain(text)).strip(" \"'.,;:!?*").casefold()
