"""Generate the exchanges of dialogs: a question, at most one tool call, and a reply, filled with values.

A turn does not depend on the format of the tool call. Values are drawn from the split that they belong to:
one key in ten (numbers, dates) or in four (words, programs) is held out for testing, chosen by its hash, so
that this never changes.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Any
from zlib import crc32

from .wordings import Wordings
from .wordings.programs import PROGRAMS, hidden_check

_SHARES = {
    "arithmetic": "add 60, sub 50, mul 70, div 40, story_add 40, story_sub 40, story_mul 40, story_div 40",
    "dates": "date_after 60, date_before 30, days_between 50, weekday 40",
    "strings": "reverse 40, upper 40, count 40, repeat 20, echo 60",
    "programs": "program 100",
    "chat": "greeting 15, identity 30, ability 20, lookup 15, act 15, see 10, harm 10, unknown 15, thanks 5, "
    "goodbye 5",
}
TASKS = tuple(_SHARES)
KINDS: dict[str, tuple[str, int]] = {
    kind: (task, int(share))
    for task, shares in _SHARES.items()
    for kind, share in (entry.split() for entry in shares.split(", "))
}
"""Kind of dialog -> (its task, its weight in the default mix)."""

_HELD_OUT = 10  # one pair of numbers in ten is held out
_HELD_OUT_FEW = 4  # one word or program in four, as there are few
_FIRST_DAY, _LAST_DAY = date(1990, 1, 1).toordinal(), date(2039, 12, 31).toordinal()


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: a question, at most one call of ``tool``, a reply."""

    question: str
    reply: str
    answer: str
    tool: str = ""
    arguments: dict[str, Any] | None = None
    result: str = ""
    check: str = ""

    @property
    def expression(self) -> str:
        return (self.arguments or {}).get("expression", "")


@dataclass(frozen=True, slots=True)
class DialogSource:
    """The random generator, the language, and the splits of values and of wordings for turns."""

    rng: Random
    words: Wordings
    split: str
    wording_split: str

    def fits(self, key: str, every: int = _HELD_OUT) -> bool:
        """Return whether ``key`` belongs to this split: one key in ``every`` is held out for testing."""
        return (crc32(key.encode()) % every == 0) == (self.split == "test")

    def say(self, kind: str, **values: Any) -> tuple[str, str]:
        """Draw a wording and a reply of topic ``kind`` and fill their slots."""
        topic = self.words.topics[kind]
        choice = self.rng.choice
        values.setdefault("name", choice(self.words.names[self.split]))
        question = choice(choice(topic.lines(self.wording_split))).format_map(values)
        return question, choice(topic.replies).format_map(values)


# --- numbers, dates, words ----------------------------------------------------------------------------------


def _number(rng: Random, shares: tuple[float, float, float]) -> int:
    """Draw a number of 1 to 4 digits. ``shares`` are cumulative probabilities of the first three lengths."""
    more_digits = bisect(shares, rng.random())
    return rng.randrange(10**more_digits if more_digits else 0, 10 ** (more_digits + 1))


def _pair(source: DialogSource, draw: Callable[[Random], tuple[int, int]]) -> tuple[int, int]:
    while True:
        a, b = draw(source.rng)
        if source.fits(f"{a},{b}"):
            return a, b


_SUM_SHARES = (0.15, 0.65, 0.97)


def _draw_add(rng: Random) -> tuple[int, int]:
    return _number(rng, _SUM_SHARES), _number(rng, _SUM_SHARES)


def _draw_sub(rng: Random) -> tuple[int, int]:
    a, b = _draw_add(rng)
    return max(a, b), min(a, b)


def _draw_mul(rng: Random) -> tuple[int, int]:
    return _number(rng, (0.2, 0.75, 1.0)), _number(rng, (0.35, 0.9, 1.0))


def _draw_div(rng: Random) -> tuple[int, int]:
    b = max(1, _number(rng, (0.45, 0.98, 1.0)))
    return b * rng.randrange(1, 100), b


def _story_add(rng: Random) -> tuple[int, int]:
    return rng.randrange(2, rng.choice((20, 100, 1000))), rng.randrange(2, rng.choice((20, 100, 1000)))


def _story_sub(rng: Random) -> tuple[int, int]:
    a, b = _story_add(rng)
    return max(a, b) + 2, min(a, b)


def _story_mul(rng: Random) -> tuple[int, int]:
    return rng.randrange(2, 100), rng.randrange(2, 100)


def _story_div(rng: Random) -> tuple[int, int]:
    b = rng.randrange(2, 30)
    return b * rng.randrange(2, 50), b


_OPERATIONS: dict[str, tuple[str, Callable[[int, int], int], Callable[[Random], tuple[int, int]]]] = {
    "add": ("+", int.__add__, _draw_add),
    "sub": ("-", int.__sub__, _draw_sub),
    "mul": ("*", int.__mul__, _draw_mul),
    "div": ("/", int.__floordiv__, _draw_div),
    "story_add": ("+", int.__add__, _story_add),
    "story_sub": ("-", int.__sub__, _story_sub),
    "story_mul": ("*", int.__mul__, _story_mul),
    "story_div": ("/", int.__floordiv__, _story_div),
}


def _word(source: DialogSource) -> str:
    """Draw a real or an invented word, so that the model learns to copy and not a list of words."""
    rng = source.rng
    invented = rng.random() < 0.4
    while True:
        if invented:
            parts = range(rng.randrange(2, 4))
            word = "".join(rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") for _ in parts)
        else:
            word = rng.choice(source.words.words)
        if source.fits(word, _HELD_OUT_FEW):
            return word


# --- turns --------------------------------------------------------------------------------------------------


def _arithmetic(source: DialogSource, kind: str) -> Turn:
    sign, operation, draw = _OPERATIONS[kind]
    a, b = _pair(source, draw)
    result = str(operation(a, b))
    question, reply = source.say(kind, a=a, b=b, r=result, things=source.rng.choice(source.words.things))
    return Turn(question, reply, result, "calculator", {"expression": f"{a}{sign}{b}"}, result)


def _dates(source: DialogSource, kind: str) -> Turn:
    rng = source.rng
    while True:
        day = date.fromordinal(rng.randrange(_FIRST_DAY, _LAST_DAY + 1))
        n = rng.randrange(2, rng.choice((30, 100, 366)))
        if source.fits(f"{day}" if kind == "weekday" else f"{day},{n}"):
            break
    d = day.isoformat()
    if kind == "weekday":
        result, answer = day.strftime("%A"), source.words.weekdays[day.weekday()]
        question, reply = source.say(kind, d=d, r=answer)
        return Turn(question, reply, answer, "weekday", {"date": d}, result)
    if kind == "days_between":
        e = (day + timedelta(n)).isoformat()
        question, reply = source.say(kind, d=d, e=e, r=n)
        return Turn(question, reply, str(n), "days_between", {"start": d, "end": e}, str(n))
    days = n if kind == "date_after" else -n
    result = (day + timedelta(days)).isoformat()
    question, reply = source.say(kind, d=d, n=n, r=result)
    return Turn(question, reply, result, "add_days", {"date": d, "days": days}, result)


def _echo(source: DialogSource) -> Turn:
    """Draw a list to repeat. Nearly every token is copied, which all calls need."""
    rng = source.rng
    while True:
        items = [
            _word(source) if rng.random() < 0.4 else str(_number(rng, _SUM_SHARES))
            for _ in range(rng.randrange(2, 7))
        ]
        if source.fits(" ".join(items)):
            break
    question, reply = source.say("echo", list=" ".join(items))
    return Turn(question, reply, " ".join(items))


def _strings(source: DialogSource, kind: str) -> Turn:
    if kind == "echo":
        return _echo(source)
    w = _word(source)
    if kind == "repeat":
        question, reply = source.say(kind, w=w)
        return Turn(question, reply, f'"{w}" "{w}"')
    if kind == "count":
        # usually a letter of the word, sometimes one that is not in it
        c = source.rng.choice(w) if source.rng.random() < 0.9 else source.rng.choice("aeioust")
        result = str(w.count(c))
        question, reply = source.say(kind, w=w, c=c, r=result)
        return Turn(question, reply, result, "count_letter", {"text": w, "letter": c}, result)
    result = w[::-1] if kind == "reverse" else w.upper()
    question, reply = source.say(kind, w=w, r=result)
    return Turn(question, reply, result, kind, {"text": w}, result)


def _program(source: DialogSource, kind: str) -> Turn:
    rng = source.rng
    while True:
        program = rng.choice(PROGRAMS)
        name, params = rng.choice(program.names), rng.choice(program.params)
        k = rng.randrange(2, 100) if program.constant else 0
        if source.fits(f"{program.key},{name},{params},{k}", _HELD_OUT_FEW):
            break
    values = {**dict(zip("abc", params, strict=False)), "k": str(k)}
    signature = f"{name}({', '.join(params)})"
    body = program.body.format_map(values)
    purpose = source.words.programs[program.key].format_map(values)
    question, reply = source.say(
        kind, sig=signature, what=purpose, code=f"def {signature}:\n    return {body}"
    )
    return Turn(question, reply, f"def {name}(", check=hidden_check(program, name, k))


def _chat(source: DialogSource, kind: str) -> Turn:
    question, reply = source.say(kind)
    return Turn(question, reply, reply)


MAKERS: dict[str, Callable[[DialogSource, str], Turn]] = {
    "arithmetic": _arithmetic,
    "dates": _dates,
    "strings": _strings,
    "programs": _program,
    "chat": _chat,
}


def make_turn(source: DialogSource, kind: str) -> Turn:
    """Draw a turn of ``kind`` (a key of ``KINDS``) from ``source``."""
    return MAKERS[KINDS[kind][0]](source, kind)
