"""Find the choice that an answer names, by its letter or by its text.

A letter counts if it cannot be a word or part of one: stated ("the answer is B"), at the beginning of a line
("B. because") or marked ("(B)", "option B"). The text of a choice counts in the same positions, and anywhere
if it is too long to occur by chance. Denied choices do not count. What is said of all but one choice ("all
but B are wrong") says the opposite of that one. An answer that names two choices names none.

The answer is read in two steps. Each word becomes the letter of its kind (`_KINDS`), or "_", and each choice
becomes X: "The answer is not A, but B." is "tavnX,sX.". Short patterns of these letters then decide what is
said of each choice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

_KINDS = {
    # words that name or recommend a choice
    "a": "answer, antwort, lösung, respuesta, réponse, risposta, resposta, ответ, jibu, jibu ni, उत्तर, उत्तर है"
    ", ข้อ, 选, 選, 选择, 選擇, 选项, 選項", "A": "答案, 答え, 正解, คำตอบ",
    "o": "option, opción, opção, choice, letter", "d": "definitely, probably, clearly, therefore",
    "s": "so, thus, hence, but, sondern, sino, mais, ma, mas, а, но", "W": "actually, wait, correction",
    "h": "say, choose, chose, pick, select, go with, favor, favour, prefer, preferred",
    "k": "think, believe, recommend, true that, the case that, certain that, likely that",
    # right, wrong, not
    "r": "right, correct, best, better, preferable, true, selected, richtig, richtige, correcta, correcto,"
    " correcte", "y": "likely", "p": "partly, partially", "✓": "✓, ✔, ✅", "✗": "✗, ✘, ❌",
    "w": "wrong, incorrect, false, untrue, worst, worse, less, impossible, unlikely, doubtful, unclear"
    ", falsch, faux, fausse, fausses, falso, falsa, falsos, falsas, incorrecto, incorrecta, incorrectos"
    ", incorrectas",
    "g": "reject, rejected, rejecting, eliminate, eliminated, eliminating, exclude, excluded, excluding,"
    " rule out, ruled out, ruling out, avoid",
    "n": "not, n't, never, cannot, hardly, barely, neither, far from, nicht, kein, weder, pas, не",
    "N": "no, none, nothing", "_": "no doubt, without doubt", "O": "not only, not just, not merely",
    "x": "than, over, instead of, unlike, as opposed to, no way, doubt, 不是, 不选, 不選",
    "E": "except, except for, apart from, aside from, other than, außer, sauf, excepto",
    "Q": "all, any, anything, anyone, each, every, everything, everyone",
    "S": "know, known, sure, certain, tell, told, determine, determined, answered",
    # verbs; "can't" and "won't" are divided before n't
    "v": "is, was, ist, est, seems, remains, lautet, é, é a", "V": "are, were, do, sind, son, sont",
    "c": "can, could, might, may, does, did, ca, wo", "m": "must, should, would", "e": "be",
    "i": "it is, it's, es ist, c'est, =, 是", "K": "es, è",
    # all others
    "t": "the, la, die", "j": "that", "u": "to",
    "f": "options, choices, answers, one, of, these, them, other, rather, most, really, equal to, maybe,"
    " possibly, perhaps",
    "l": "and, or, und, oder, et, ou, ni, y, o, и, или", "L": "nor, noch",
    "T": "also, auch, aussi", "U": "too, as well", "I": "if, unless, whether", "B": "because, since, as",
    ",": "、, /, &", ".": "。", "-": "–, —",
}  # fmt: skip
"""The words of each kind, in lower case."""
_KIND = {unicodedata.normalize("NFKC", word): kind for kind in _KINDS for word in _KINDS[kind].split(", ")}
_KIND |= {mark: mark for mark in ".,;:!?-\n"}
_WORD = r"[^\W\u0e00-\u0e7f\u3040-\u9fff]"  # Thai, Japanese and Chinese have no spaces between words
_PHRASE = "|".join(
    re.escape(word) + rf"(?!{_WORD})" * bool(re.match(_WORD, word[-1]))
    for word in sorted(_KIND, key=len, reverse=True)
    if len(word) > 1 and not re.fullmatch(rf"(?:{_WORD}|')+", word)
)
_TOKEN = re.compile(rf"{_PHRASE}|{_WORD}+?(?=n't)|n't|\d+(?:[.,]\d+)*|{_WORD}+(?:'{_WORD}+)*|\S|\n")

_MARKUP = re.compile(r"\\(?:text|math)\w*(?=\{)|\\[()\[\]]|\*\*|__|[`$]|</?(?:b|strong|i|em|u)>")
_CHARACTERS = str.maketrans("’‘“”„İ", "''\"\"\"I")  # fmt: skip  # lower() makes two of İ
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_BEFORE_TEXT = re.compile(rf"(?<!{_WORD})(?<![.-])")
_AFTER_TEXT = re.compile(rf"(?!{_WORD}|[.,]\d|\s*[-+*/=^×÷]\s*[\w(])")
_LETTER = re.compile(rf"(?<!{_WORD})(?<!\w')(?<![+#&.-])[A-Za-z](?!{_WORD}|'\w|[+#&-]|\.\w|\s*=)")
_NO_WORD = re.compile(
    r"[\"')\]}*]|[ .]*(?:$|[,;:!?\n/—–-]|\. |\b(?:because|since|as|is|was|are|were|isn't|does|doesn't|cannot"
    r"|can't|(?:can|could|may|might|must|should) be|for|due|which|would|seems|and|or|but|nor|rather than"
    r"|instead of|ist|sind|est|sont|es|son|(?:over|to)(?=\W+(?:option )?[A-J]\b))\b)"
)
"""The text behind "A", "I" or a small letter that is not a word."""

# Kinds before a choice:
_FILLERS = "(?:[tdfeiKy]|[ao]v?)*"
_ALL_BUT = "(?:E|[QN][tfoa]*s)"
_DENIED_BEFORE = re.compile(
    rf"""(?x)(?:
    nu?[khvc]?j?(?:t?\w?[ao][vm])?  # "not", "n't think that the right answer is"
    |[LNxg]|{_ALL_BUT}|h[^.!?;\n]{{1,12}}u  # "nor", "than", "we exclude", "all but", "I prefer B to"
    |wj|w[aof][vVm]?|(?:^|[.!?;\n])w  # "false that", "the wrong answer is", "Wrong:"
    )j?{_FILLERS}$"""
)
_STATED = re.compile(
    rf"(?:[aor][^.!?;\n]{{,12}}?[veimK]|(?:a|(?<!Xv)(?<!Xvt)r)[:\n-]*){_FILLERS}$|A[^X.\n]{{,8}}$"
)  # "the answer to this is", "Correct:", but not "A is correct"
_MARKED = re.compile(rf"(?:[osdihKW]|me){_FILLERS},?$")  # "so it is", "it must be", "I choose the option"
_NOT_ONLY = re.compile(rf"O{_FILLERS}$")
_CORRECTED = re.compile(r"W[^.!?\n]*$")
_CONDITION = re.compile(r"I[^.!?\n]*$")
_AT_LINE_START = re.compile(r"(?:^|\n)[^\w\n]*$")
_AFTER_CLAUSE = re.compile(
    rf"[^\WX][.!?;]$|[nNLx]{_FILLERS}(?:X[,lL]*)*[X_][.!,;:-]+\n*$"
)  # "Sure!", "not A;"
_WINDOW = 50
"""The number of kinds before a choice that are read."""
# Kinds behind a choice:
_RIGHT = re.compile(r"[vmK]e?[tdfy]*(?:[ra]|y(?![nw]))|✓")
_DENIED_AFTER = re.compile(
    r"[.:]?[vVcmK]e?[tdfy]*_?[nwpgN](?!:)|[.:]?[nwpg](?!:|[vV]?[tofd]*X)|✗"
)  # "is most likely wrong", ": incorrect", but not ". Not B"
_ASKED = re.compile(r"[^.,;:!?\n]{,12}\?")
_ALSO = re.compile(r"[vcmK]e?,?(?:T|U(?!\w))")
_NOTHING = re.compile(r"[.!]?(?:\n|$)|,?f?[Bnx]")
_VERB = re.compile(r"[vcmK](?:[.,;:!\n]|$)")
"""A verb without more says of a choice what was denied of the one before: "A is not right; B is"."""
# Kinds between and around several choices:
_LIST = re.compile("X(?:,[tof]*X)*(?:,?[lLu][tof]*X)*")
_BOTH = re.compile(r"[^.!?;\n]*[lL][^.!?;\n]*")
_EXCEPTION = re.compile(
    rf"[^.,;:!?\n]{{,50}}(?:,E|{_ALL_BUT}){_FILLERS}({_LIST.pattern})(?!,?[lL]),?[^.,;:!?\n]{{,50}}(?:[.,;:!\n]|$)"
)
"""A clause about all choices but some. An odd number of denials in it says that those are right."""


@dataclass
class _Mention:
    """A choice named in a text. ``place`` is its index in the kinds.

    ``strength`` 3: stated, 2: at the beginning of a line, 1: marked or long. ``joined``: "A or B".
    """

    choice: int
    start: int
    end: int
    place: int = 0
    strength: int = 0
    denied: str = ""
    joined: bool = False


def chosen_letter(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that an answer commits to, or None.

    ``letters[i]`` means ``choices[i]``.
    """
    text, bare = _plain(text), [_bare(_plain(choice)) for choice in choices]
    texts = {i: c for i, c in enumerate(bare) if not (len(c) == 1 and c.isalpha())}
    said = _ARTICLE.sub("", _bare(text))
    whole = [i for i, c in texts.items() if _ARTICLE.sub("", c) == said]
    if len(whole) == 1:
        return letters[whole[0]]
    mentions = _mentions(text, letters, texts)
    kinds = _place(mentions, text)
    for mention in mentions:
        _weigh(mention, text, kinds)
    _read_lists(mentions, kinds)
    _read_exceptions(mentions, kinds, len(choices))
    for one, other in pairwise(mentions):
        is_condition = _CONDITION.search(kinds, max(0, other.place - _WINDOW), other.place)
        if one.denied and _VERB.match(kinds, other.place + 1) and not is_condition:
            other.strength = 3
    mentions = [mention for mention in mentions if not mention.denied]
    for strength in (3, 2, 1):
        found = [mention for mention in mentions if mention.strength == strength]
        if strength == 3:  # a later statement corrects an earlier one, unless "and" joins them
            two = found[-2:]
            are_both = len(two) == 2 and _BOTH.fullmatch(kinds, two[0].place + 1, two[1].place)
            found = two if are_both else found[-1:]
        elif strength == 1 and re.search("ne?S", kinds):  # "I don't know"
            return None
        if found:
            first = found[0].choice
            agreed = all(mention.choice == first and not mention.joined for mention in found)
            return letters[first] if agreed else None
    return None


def _mentions(text: str, letters: str, texts: Mapping[int, str]) -> list[_Mention]:
    """Return the mentions of choices in order, without those inside a longer one."""
    found = []
    for match in _LETTER.finditer(text):
        number = letters.find(match[0].upper())
        # "a" and "I" are words of English, "e" and "y" of Spanish
        may_be_word = match[0] in "AI" or match[0].islower()
        if number >= 0 and (not may_be_word or _NO_WORD.match(text, match.end())):
            found.append(_Mention(number, *match.span()))
    lower, all_texts = text.lower(), list(texts.values())
    for number, choice in texts.items():
        is_unique = choice and choice in lower and all_texts.count(choice) == 1
        for match in re.finditer(re.escape(choice), lower) if is_unique else ():
            if _BEFORE_TEXT.match(text, match.start()) and _AFTER_TEXT.match(text, match.end()):
                found.append(_Mention(number, *match.span()))
    found.sort(key=lambda mention: (mention.start, -mention.end))
    outer = found[:1]
    for mention in found[1:]:
        if mention.start >= outer[-1].end:
            outer.append(mention)
    return outer


def _place(mentions: Sequence[_Mention], text: str) -> str:
    """Return the kinds of the words of a text, and set the places of the mentions in them."""
    kinds, position = "", 0
    for mention in [*mentions, _Mention(-1, len(text), len(text))]:
        words = _TOKEN.findall(text[position : mention.start].lower())
        kinds += "".join([_KIND.get(word, "_" * word[0].isalnum()) for word in words]) + "X"
        mention.place, position = len(kinds) - 1, mention.end
    return kinds[:-1]


def _weigh(mention: _Mention, text: str, kinds: str) -> None:
    """Set what the words around a mention say of it."""
    opened, after = kinds[max(0, mention.place - _WINDOW) : mention.place], mention.place + 1
    before = opened.rstrip(":-\n")
    is_right = _RIGHT.match(kinds, after)
    if _DENIED_BEFORE.search(before):
        mention.denied = "before"
    elif _DENIED_AFTER.match(kinds, after) or (_ASKED.match(kinds, after) and not is_right):
        mention.denied = "after"
    around = text[mention.start - 1 : mention.start] + text[mention.end : mention.end + 1]
    is_wrapped = around in ("()", "[]", "{}", '""', "''")
    is_marked = _MARKED.search(before)
    mention.joined = bool(_NOT_ONLY.search(before) or _ALSO.match(kinds, after))
    if is_right or mention.joined or _STATED.search(before):
        mention.strength = 3
    elif _AT_LINE_START.search(opened):
        mention.strength = 2
    elif is_marked and _CORRECTED.search(opened):
        mention.strength = 3
    elif is_wrapped or is_marked or (_AFTER_CLAUSE.search(opened) and _NOTHING.match(kinds, after)):
        is_small_letter = mention.end - mention.start == 1 and text[mention.start].islower()
        mention.strength = int(is_wrapped or not is_small_letter)
    else:
        mention.strength = int(mention.end - mention.start >= 4)


def _read_lists(mentions: Sequence[_Mention], kinds: str) -> None:
    """Join the mentions of a list, or deny all of them: "A or C", "not A or C", "A and C are wrong"."""
    following = iter(mentions)
    for found in _LIST.finditer(kinds):
        listed = list(islice(following, found[0].count("X")))
        is_list = len(listed) > 2 or re.search("[lL]", found[0])
        is_denied_after = listed[-1].denied and kinds.startswith("V", found.end())
        if is_list and (is_denied_after or listed[0].denied == "before"):
            for mention in listed:
                mention.denied = mention.denied or "list" * (mention.strength < 3)
        for one, other in pairwise(listed):
            if one.choice != other.choice and not (one.denied or other.denied):
                one.joined = other.joined = True


def _read_exceptions(mentions: Sequence[_Mention], kinds: str, n_choices: int) -> None:
    """State the choice excepted from wrong ones, or the only one that is not excepted from right ones."""
    at = {mention.place: mention for mention in mentions}
    for found in _EXCEPTION.finditer(kinds):
        excepted = [at[place] for place in range(*found.span(1)) if place in at]
        named = {mention.choice for mention in excepted}
        if len(re.findall("[nLNwg]", found[0])) % 2 == 0:
            named = set(range(n_choices)) - named
        if len(named) == 1:
            excepted[0].choice, excepted[0].denied, excepted[0].strength = named.pop(), "", 3


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    return _MARKUP.sub("", text.replace("\\boxed", "\nanswer: ")).strip()


def _bare(text: str) -> str:
    text = re.sub(r"\s+", " ", text).lower()
    return text.strip(" \"'.,;:!?*") or text
