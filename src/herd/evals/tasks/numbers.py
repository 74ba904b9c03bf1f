"""Find the number that an answer gives as its result.

Models write a number in many ways: in LaTeX, in bold, with a currency, with the digits of another script,
with thousands separators that depend on the language. A range, an alternative, a time or a denied number is
not a result.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

DECIMAL_COMMA = ("de", "es", "fr", "it", "pt", "ru")
"""Languages (CLDR) that write a decimal comma, and a point or a space between thousands."""

_STATEMENT = re.compile(
    unicodedata.normalize("NFKC", r"คำตอบ[^\d\n]{0,9}?(?:คือ|:)|")  # as the text it is compared with
    + r"(?P<english>(?P<final>final )?answer)(?: (?:to|of|for)(?: [\w']+){1,6}?)?"
    r"(?: (?:is|would be|should be|must be)\b|\W*?[:=\n])"
    r"|(?P<boxed>\\boxed(?=\{)|####(?=\s*[-+]?\d))"
    r"|antwort(?: ist| lautet|\W*?:)|respuesta(?: \w+)?(?: es\b|\W*?:)|réponse(?: \w+)?(?: est\b|\W*?:)"
    r"|ответ(?: \w+)?\W*?[:=—-]|答え[^\d\n]{0,9}?[は:]|答案[^\d\n]{0,9}?[是为為:]"
    r"|উত্তর|సమాధానం|jibu(?: \w+)?(?: ni\b|\W*?:)",
    re.IGNORECASE,
)
_CURRENCY = r"(?:\b(?:US|A|C|R)(?=\$)|\b(?:USD|EUR|GBP|Rs\.?)|[$€£¥₹฿₽¢])\s?"
_DENIED = re.compile(
    r"(?:\b(?:not|never|nicht|pas|не)|n't|no es) (?:equal to |exactly |just |simply )?[-+]?\d[\d.,]*",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:do not|don't) know\b|\bnot (?:sure|certain)\b|\b(?:cannot|can't|could not) (?:be|say|tell|d)"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d^])(?<!\d[.,:/])(?P<sign>[-+]?)(?P<digits>\d(?:[\d.,]{0,60}\d)?|\.\d{1,60})"
)
_MINUS = re.compile(r"\b(?:minus|negative|moins|menos|meno|минус) (?=\.?\d)", re.IGNORECASE)
_MULTIPLES = {
    12: "dozen",
    100: "hundred",
    10**3: "thousand|tausend|mille|mil|mila|тысяч[аи]?|тыс",
    10**5: "lakh",
    10**6: "millions?|millionen|mio|millones|millón|milhões|milhão|milion[ei]|миллион(?:а|ов)?|млн",
    10**7: "crore",
    10**9: "billions?",
    10**12: "trillions?",
}
_SHORT_MULTIPLES = {10**3: "[kK]|千", 10**4: "[万萬]", 10**6: "M", 10**8: "[億亿]", 10**9: "B|bn"}
"""Written directly behind a number. "m" is not among them, because it is the metre."""
_MULTIPLE = re.compile(
    "|".join(
        [rf"(?i:[ -](?P<x{value}>{words})\b)" for value, words in _MULTIPLES.items()]
        + [rf"(?P<s{value}>{words})(?![A-Za-z\d])" for value, words in _SHORT_MULTIPLES.items()]
    )
)
_CALCULATION = re.compile(r"^(?:(?:[\d\s.,%()+*/×·÷x-]|(?<=\d)(?:[kKMB]|bn)\b)*=)+")
_FRACTION = re.compile(r"(?: (\d+))? ?/ ?(\d{1,9})(?![\d/])")
_NO_RESULT_BEFORE = re.compile(
    r"\d[\d.,]*(?:\s*\w+)?\s*(?:[-~/]|\b(?:to|or|bis|oder|ou|или)\b)\s*$|between \S+ and $"
)
"""Text before the last number that makes it the end of a range, an alternative or a calculation."""
_NO_RESULT_AFTER = re.compile(
    r"(?:[kKMB]|bn)?\s*(?:[-~:^*×/+,]|\b(?:to|bis|à|a)\b)\s*[-+]?\d"
    r"|(?:[kKMB]|bn| [^\W\d]+)? (?:or|and|oder|und|ou|et|o|y|или|и) [-+]?\d|e[-+]?\d|\d"
)


def final_number(text: str, language: str = "en") -> Fraction | None:
    """Return the number that an answer commits to, or None.

    The last statement of the form "the final answer is N", ``\\boxed{N}`` or ``#### N`` counts. If there is
    none, "the answer is N" counts, in English or in the language of the problem, and else the last number.
    ``language`` decides the meaning of points and commas. In an English statement, the number may also be in
    English notation.
    """
    text = _DENIED.sub("", _plain(text))
    stated: dict[bool, Fraction | None] = {}
    thousands = "." if language in DECIMAL_COMMA else ","
    for found in _STATEMENT.finditer(text):
        clause = re.split(r"[.!?;。]\s|\n", _close_sign(text[found.end() :]).lstrip(), maxsplit=1)[0]
        clause = _CALCULATION.sub("", _join_thousands(clause))
        if number := _NUMBER.search(clause):
            certain = not _NO_RESULT_AFTER.match(clause, number.end()) or _FRACTION.match(
                clause, number.end()
            )
            marks = thousands + "," * bool(found["english"])
            final = bool(found["final"] or found["boxed"])
            stated[final] = _value(number, marks) if certain else None
    if stated:
        return stated.get(True, stated.get(False))
    if language in DECIMAL_COMMA:
        text = _join_thousands(text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers or _UNSURE.search(text) or _NO_RESULT_BEFORE.search(text, 0, numbers[-1].start()):
        return None
    return _value(numbers[-1], thousands)


def _plain(text: str) -> str:
    """Return the text with numbers in ASCII, without currencies and markup around them."""
    text = re.sub(r"(?<=\d)[⁰¹²³⁴-⁹]+", "^2", text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda match: f" {match[0]}", text)
    text = re.sub(r"(?<=\d)(?:[\u00a0\u202f\u2009'’_٬]|\\[,!]\\?!?|\{,\})(?=\d{3}(?!\d))", "", text)
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("−–‐⁄٫’", "---/.'"))
    text = "".join(str(unicodedata.digit(char)) if char.isdecimal() else char for char in text)
    text = _MINUS.sub("-", re.sub(r"\\(?:times|cdot)(?![a-z])", "*", text))
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text(?:bf)?|math(?:rm|bf))(?=\{)|\\(?=[$%])|\\[()\[\],! ]|\*\*|__|`", "", text)
    return re.sub(_CURRENCY, "", text)


def _close_sign(clause: str) -> str:
    """Return the clause without the space in an initial "- 5", unless it is an item of a list."""
    return re.sub(r"^([ {(]*[-+]) (?=\d)", r"\1", clause)


def _join_thousands(text: str) -> str:
    return re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", ""), text)


def _value(number: re.Match[str], thousands: str) -> Fraction | None:
    """Return the value of a number and an optional fraction, or None if its separators are wrong."""
    digits = number["digits"]
    separators = [char for char in digits if char in ".,"]
    if separators:
        last = separators[-1]
        grouped = re.fullmatch(rf"[1-9]\d{{0,2}}(?:\{last}\d{{3}})+|[1-9]\d?(?:,\d\d)+,\d{{3}}", digits)
        if grouped and (last in thousands or len(separators) > 1):
            digits = digits.replace(last, "")
        elif separators.count(last) > 1:
            return None
        else:
            whole, _, decimals = digits.rpartition(last)
            other = "," if last == "." else "."
            if other in whole and not re.fullmatch(
                rf"\d{{1,3}}(?:\{other}\d{{3}})+|\d\d?(?:,\d\d)+,\d{{3}}", whole
            ):
                return None
            digits = f"{whole.replace(other, '') or '0'}.{decimals}"
    value = Fraction(digits)
    if over := _FRACTION.match(number.string, number.end()):
        if not int(over[2]):
            return None
        value = value + Fraction(int(over[1]), int(over[2])) if over[1] else value / int(over[2])
    elif times := _MULTIPLE.match(number.string, number.end()):
        value *= int(str(times.lastgroup)[1:])
    return -value if number["sign"] == "-" else value
