"""Find the choice that an answer names, by its letter or by its text.

A letter counts if it cannot be a word or part of one: stated ("the answer is B"), at the beginning of a line
("B. because") or marked ("(B)", "option B"). The text of a choice counts in the same positions, and anywhere
if it is too long to occur by chance. Denied choices do not count, and what is said of all but one choice
("all but B are wrong") says the opposite of that one. An answer that names two choices names none.
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
_LETTER = re.compile(rf"(?<!{_WORD})(?<!\w')(?<![+#&.-])[A-Za-z](?!{_WORD}|'\w|[+#&-]|\.\w|\s*=)")
_OPENING, _CLOSING = " \n\"'([{:*>–-", "\"')]}*"
_CHOOSE = r"say|choose|chose|pick|select|go with|prefer|favou?r"
_EXCLUDE = r"reject(?:ed|ing)?|eliminat(?:ed?|ing)|exclud(?:ed?|ing)|rul(?:ed?|ing) out"
_DENY = (
    rf"(?:\w+n't|not|cannot|never|hardly|barely|wrong|incorrect(?:[ao]s?|es)?|false|impossible|{_EXCLUDE}"
    r"|unlikely|doubtful|nicht|falsch|pas|faux|fausses?|fals[ao]s?)\b"
)
_FILLERS = (
    r"(?: (?:be|the|la|die|it is|it's|options?|opción|choices?|answer|answer is|letter|definitely|probably"
    r"|clearly|therefore|rather|likely|most|really|equal to))*"
)
"""Words between a cue and the choice."""
_EXCEPT = (
    r"(?:(?:except|apart from|aside from|other than|außer|sauf|excepto)(?: for)?|(?:all|any\w*|each|every\w*"
    r"|none|nothing|no)(?: (?:one|of|the|these|them|other|options?|choices?|answers?|statements?))* but)"
)
"""Words that except a choice from the others."""
_LIST_WORD = r"\b(?:and|or|nor|und|oder|noch|et|ou|ni|y|o|и|или)\b"
_STATED = re.compile(
    r"(?i)(?:答案|答え|正解|ค\u0e4d\u0e32ตอบ)[^\d\n]{0,8}$"  # NFKC divides the vowel of คำตอบ
    r"|(?:[选選][择擇項项]?|ข้อ|उत्तर(?: है)?)$"
    r"|(?:\b(?:answer|choice|option|letter|correct|right|best|antwort|richtige?|respuesta|correcta|réponse"
    r"|risposta|resposta|ответ|jibu)\b[^.!?\n]{0,40}?\b(?:is|be|was|ist|lautet|es|est|è|é|é a|ni)"
    r"|\b(?:answer|correct|right|selected|antwort|lösung|respuesta|réponse|risposta|resposta|ответ|jibu)"
    rf"){_FILLERS}$"
)
_RIGHT_AFTER = re.compile(
    r"(?i) (?:is|was|seems|must be|would be|ist|est|es) (?:the |clearly |definitely |most |la |die )*"
    r"(?:correct|right|best|better than|preferable to|true|likely|answer|richtig|respuesta|réponse)| ?[✓✔✅]"
)
_VERB_AFTER = re.compile(r"(?i) (?:is|was|does|did|would|remains|ist|est|es)(?=\s*(?:[.,;:!)]|$))")
"""A verb without more, which says of a choice what was denied of the one before: "A is not right; B is"."""
_ALSO_AFTER = re.compile(
    r"(?i) (?:is|was|does|(?:would|could|might) be|ist|est|es),? (?:also|auch|aussi|(?:too|as well)(?! \w))\b"
)
_MARKED = re.compile(
    r"(?i)(?:\b(?:option|opción|opção|choice|letter|so|therefore|thus|hence|but|sondern|sino|mais|ma|mas|а"
    r"|но|it is|it's|es|es ist|c'est|è|(?:must|should|would) be|definitely|probably|clearly"
    rf"|{_CHOOSE}){_FILLERS},?|=|是|选|選)$"
)
_DENIED_BEFORE = re.compile(
    r"(?i)(?:(?:\b(?:not|never|cannot|hardly)|n't)(?: to)?"
    rf"(?: (?:think|believe|recommend|{_CHOOSE}|(?:true|the case|certain|likely) that))?"
    r"(?: that)?(?: (?:it|this|the (?:\w+ )?(?:answer|choice|option))(?:'s| is| was| would be))?"
    r"|\bneither(?: is| was| does| can)?|\bprefer\w*\b[^.!?;\n]{1,60} to"
    rf"|\b(?:nor|than|over|instead of|unlike|nicht|kein|weder|noch|no es|no|pas|не|{_EXCEPT}|{_EXCLUDE}"
    r"|as opposed to|far from|no way|avoid|(?<!no )(?<!without )doubt|(?:false|untrue|wrong|incorrect) that"
    r"|(?:wrong|incorrect|worst) (?:answer|option|choice)s?(?: is| are| was| would be)?)|不是|不选|不選"
    rf"|(?:^|[.!?;\n] *)(?:wrong|incorrect|false))(?: that)?{_FILLERS}$"
)
_DENIED_AFTER = re.compile(
    r"(?i)[.:]? (?:(?:is|are|was|were|can|could|would|does|seems|must|ist|est|es)(?: be)?(?: \w+)? )?"
    rf"(?:{_DENY}|(?:partly|partially|less|worse|far from|unclear)\b)(?!:)| ?[✗✘❌]|[^.,;:!?\n]{{0,60}}\?"
)
"""Words after a choice that deny it. A question does not choose either."""
_EXCEPTED = re.compile(
    rf"(?i)[^.,;:!?\n\0]*(?:, )?\b{_EXCEPT}{_FILLERS}\0"
    rf"(?!,?\s*(?:{_LIST_WORD}|(?-i:[A-H])\b)),?[^.,;:!?\n]*(?:[.,;:!\n]|$)"
)
"""A clause about all choices but one ("\\0"). An odd number of denials in it says that this one is right."""
_DENIAL = re.compile(rf"(?i)\b(?:{_DENY}|(?:no|none|nothing)\b)")
_PLURAL_AFTER = re.compile(r"(?i) (?:are|were|aren't|weren't|do|don't|sind|son|sont)\b")
_NOT_ONLY = re.compile(rf"(?i)\bnot (?:only|just|merely){_FILLERS}$")
_NO_WORD_AFTER = re.compile(
    r"[ .]*(?:$|[,;:!?\n/—–-]|\. |\b(?:because|since|as|is|was|are|were|isn't|does|doesn't|cannot|can't"
    r"|can be|for|due|which|would|seems|and|or|but|nor|rather than|instead of"
    r"|(?:over|to)(?=\W+(?:option )?[A-J]\b))\b)"
)
_LISTED = re.compile(
    rf"[\"')]*\s*(?:[,/&]|,?\s*(?P<word>{_LIST_WORD}|\bto\b))\s*"
    r"(?:the |option |choice |maybe |possibly |perhaps )*[\"'(]*"
)
"""The text between two neighbours of a list. If its first or last one is denied, all of them are."""
_BOTH = re.compile(rf"[^.!?;\n]*{_LIST_WORD}[^.!?;\n]*")
_CONDITION = re.compile(r"(?i)\b(?:if|unless|whether)\b[^.!?\n]*$")
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_CORRECTED = re.compile(r"(?i)\b(?:actually|wait|correction)\b[^.!?\n]*$")
_CLAUSE_BEFORE = re.compile(
    rf"(?i)\w\w[.!?;] [\"']?$|(?:\b(?:not|than|instead of|unlike|nicht|pas)|n't){_FILLERS}"
    r"(?:\W+(?:and|or|nor|oder|ou|\w))*\W+\w+\W*[.,;:—–]\W*$"
)
_NOTHING_AFTER = re.compile(r"[.!]?\s*(?:\n|$)|,? (?:because|since|as)\b")
"""The surroundings of a choice that is a clause by itself: "Good question. B", "not A; B"."""
_UNSURE = re.compile(
    r"(?i)\b(?:do not|don't) know\b|\bnot (?:sure|certain)\b"
    r"|\bcannot (?:be (?:sure|certain|determined|known|said|told|answered)|say|tell|determine)"
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
        is_verb = _VERB_AFTER.match(text, other.end) and not _CONDITION.search(text, 0, other.start)
        if one.denied and is_verb:
            mentions[number] = replace(other, strength=3)
    mentions = [mention for mention in mentions if not mention.denied]
    for one, other in pairwise(mentions):
        if one.choice != other.choice and _LISTED.fullmatch(text, one.end, other.start):
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
    found.sort(key=lambda mention: (mention.start, -mention.end))
    outer = found[:1]
    for mention in found[1:]:
        if mention.end > outer[-1].end or (mention.start, mention.end) == (outer[-1].start, outer[-1].end):
            outer.append(mention)
    return outer


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
        out += [replace(m, denied="list") if is_list and as_a_whole and m.strength < 3 else m for m in run]
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
    opened = text[max(0, mention.start - SURROUNDINGS) : mention.start]
    closed = text[mention.end : mention.end + SURROUNDINGS]
    before, after = opened.rstrip(_OPENING), closed.lstrip(_CLOSING)
    denied_before = _DENIED_BEFORE.search(before)
    excepted = denied_before and _EXCEPTED.search(f"{before}\0{after}")
    is_exception = excepted and len(_DENIAL.findall(excepted[0])) % 2  # the others are said to be wrong
    denied_after = _DENIED_AFTER.match(after) and not _RIGHT_AFTER.match(after)
    denied = "" if is_exception else "before" if denied_before else "after" if denied_after else ""
    wrapped = opened.endswith(("(", "[", "{", '"', "'")) and closed != after
    is_also = _ALSO_AFTER.match(after)
    is_one_of_two = _NOT_ONLY.search(before)
    alone = _CLAUSE_BEFORE.search(opened) and _NOTHING_AFTER.match(after)
    if is_exception or is_also or _STATED.search(before) or _RIGHT_AFTER.match(after):
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


def _is_letter(choice: str) -> bool:
    return len(choice) == 1 and choice.isalpha()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("’‘“”„", '\'\'"""'))
    return _MARKUP.sub("", text.replace("\\boxed", "\nanswer: ")).strip()


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", _plain(text)).strip(" \"'.,;:!?*").casefold()
