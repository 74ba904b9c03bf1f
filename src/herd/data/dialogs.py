"""Dialogs made by program, right by construction: what an instruct model of a few million parameters learns from.

Every dialog carries what is needed to verify it: the expected result of its tool call, the string its answer must
contain, for programs a hidden check. The stream is a pure function of the seed. Test dialogs are held out three ways
at once: other wordings, other people's names, and other numbers (pairs of operands, dates, words and programs go to
train or test by hash; each single number occurs in train, the pair does not).

Small models learn this because it is mostly copying: operands appear in the question in the order in which the call
needs them, and numbers and words stand where the tokenizer cuts them alike each time (see ``wordings``). After the
idea of synthetic tool data in Llama 3.1 (arXiv 2407.21783, section 4.3.5), with programs in place of a big model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import cache
from itertools import accumulate
from random import Random
from typing import Any
from zlib import crc32

from ..errors import DataError
from ..text.chat import CODE_INTERPRETER, FORMS
from ..tools import CUSTOM_TOOLS
from .prompts import CODE, TOOL_NAMES, interpreter_result, system_prompt
from .scoring import Verdict, score
from .wordings import LANGUAGES, Wordings, load
from .wordings.programs import PROGRAMS, check, slots

__all__ = [
    "FORMS",
    "KINDS",
    "LANGUAGES",
    "TASKS",
    "Dialog",
    "Verdict",
    "documented",
    "make_dialogs",
    "score",
    "showcase",
    "showcase_dialogs",
    "training_texts",
]

Message = dict[str, Any]

# Kind of dialog -> (its task, its share of the default mix in per mille).
KINDS: dict[str, tuple[str, int]] = {
    "add": ("arithmetic", 60),
    "sub": ("arithmetic", 50),
    "mul": ("arithmetic", 70),
    "div": ("arithmetic", 40),
    "story_add": ("arithmetic", 40),
    "story_sub": ("arithmetic", 40),
    "story_mul": ("arithmetic", 40),
    "story_div": ("arithmetic", 40),
    "date_after": ("dates", 60),
    "date_before": ("dates", 30),
    "days_between": ("dates", 50),
    "weekday": ("dates", 40),
    "reverse": ("strings", 40),
    "upper": ("strings", 40),
    "count": ("strings", 40),
    "repeat": ("strings", 20),
    "echo": ("strings", 60),
    "program": ("programs", 100),
    "greeting": ("chat", 15),
    "identity": ("chat", 30),
    "ability": ("chat", 20),
    "lookup": ("chat", 15),
    "act": ("chat", 15),
    "see": ("chat", 10),
    "harm": ("chat", 10),
    "unknown": ("chat", 15),
    "thanks": ("chat", 5),
    "goodbye": ("chat", 5),
}
TASKS = ("arithmetic", "dates", "strings", "programs", "chat")

_HELD_OUT = 10  # one pair of numbers in ten is held out
_HELD_OUT_FEW = 4  # one in four where there are few: words, programs
_EARLIER_TURN = 0.05  # share of train dialogs that begin with another exchange
_FIRST_DAY, _LAST_DAY = date(1990, 1, 1).toordinal(), date(2039, 12, 31).toordinal()


@dataclass(frozen=True)
class Dialog:
    """A dialog and what makes it verifiable.

    ``messages`` are in the chat format (system, user, assistant with ``tool_calls``, ipython, assistant); ``tools`` are
    the JSON schemas to hand to the renderer, empty when the system message names the tools in its own short way.
    ``call`` is the expected ``{"name", "arguments"}`` or None, ``expression`` what an arithmetic call carries,
    ``result`` the tool's value, ``answer`` a string the last message must contain, ``check`` asserts for a program.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    form: str
    lang: str
    task: str
    kind: str
    answer: str
    call: dict[str, Any] | None = None
    expression: str = ""
    result: str = ""
    check: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages up to and including the last user message: what a model under test is given."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return self.messages[: last + 1]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One exchange before it takes a form: a question, at most one call of ``tool``, a reply."""

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
class _Source:
    """Where a turn draws from: the generator, the language, and the split of values and of wordings."""

    rng: Random
    words: Wordings
    split: str
    wording_split: str

    def fits(self, key: str, every: int = _HELD_OUT) -> bool:
        """Whether ``key`` belongs to this split: one in ``every`` keys is held out."""
        return (crc32(key.encode()) % every == 0) == (self.split == "test")

    def say(self, kind: str, **values: Any) -> tuple[str, str]:
        """A wording and a reply of topic ``kind``, slots filled."""
        topic = self.words.topics[kind]
        choice = self.rng.choice
        values.setdefault("name", choice(self.words.names[self.split]))
        question = choice(choice(topic.lines(self.wording_split))).format_map(values)
        return question, choice(topic.replies).format_map(values)


# --- numbers, dates, words ---------------------------------------------------------------------------------------


def _number(rng: Random, shares: tuple[float, float, float]) -> int:
    """A number whose length is 1, 2, 3 or 4 digits; ``shares`` are cumulative for the first three."""
    u = rng.random()
    if u < shares[0]:
        return rng.randrange(0, 10)
    if u < shares[1]:
        return rng.randrange(10, 100)
    return rng.randrange(100, 1000) if u < shares[2] else rng.randrange(1000, 10000)


def _pair(source: _Source, draw: Callable[[Random], tuple[int, int]]) -> tuple[int, int]:
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


def _word(source: _Source) -> str:
    """A word of the language, or an invented one, so that copying is learned and not a list of words."""
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


# --- turns -------------------------------------------------------------------------------------------------------


def _arithmetic(source: _Source, kind: str) -> _Turn:
    sign, operation, draw = _OPERATIONS[kind]
    a, b = _pair(source, draw)
    result = str(operation(a, b))
    question, reply = source.say(kind, a=a, b=b, r=result, things=source.rng.choice(source.words.things))
    return _Turn(question, reply, result, "calculator", {"expression": f"{a}{sign}{b}"}, result)


def _dates(source: _Source, kind: str) -> _Turn:
    rng = source.rng
    while True:
        day = date.fromordinal(rng.randrange(_FIRST_DAY, _LAST_DAY + 1))
        n = rng.randrange(2, rng.choice((30, 100, 366)))
        if source.fits(f"{day},{n}"):
            break
    d = day.isoformat()
    if kind == "weekday":
        result, answer = day.strftime("%A"), source.words.weekdays[day.weekday()]
        question, reply = source.say(kind, d=d, r=answer)
        return _Turn(question, reply, answer, "weekday", {"date": d}, result)
    if kind == "days_between":
        e = (day + timedelta(n)).isoformat()
        question, reply = source.say(kind, d=d, e=e, r=n)
        return _Turn(question, reply, str(n), "days_between", {"start": d, "end": e}, str(n))
    days = n if kind == "date_after" else -n
    result = (day + timedelta(days)).isoformat()
    question, reply = source.say(kind, d=d, n=n, r=result)
    return _Turn(question, reply, result, "add_days", {"date": d, "days": days}, result)


def _echo(source: _Source) -> _Turn:
    """A list to say again. Nearly every token is copied: the densest lesson there is in what all calls need."""
    rng = source.rng
    while True:
        items = [
            _word(source) if rng.random() < 0.4 else str(_number(rng, _SUM_SHARES)) for _ in range(rng.randrange(2, 7))
        ]
        if source.fits(" ".join(items)):
            break
    question, reply = source.say("echo", list=" ".join(items))
    return _Turn(question, reply, " ".join(items))


def _strings(source: _Source, kind: str) -> _Turn:
    if kind == "echo":
        return _echo(source)
    w = _word(source)
    if kind == "repeat":
        question, reply = source.say(kind, w=w)
        return _Turn(question, reply, f'"{w}" "{w}"')
    if kind == "count":
        # Mostly a letter of the word; now and then one that it lacks.
        c = source.rng.choice(w) if source.rng.random() < 0.9 else source.rng.choice("aeioust")
        result = str(w.count(c))
        question, reply = source.say(kind, w=w, c=c, r=result)
        return _Turn(question, reply, result, "count_letter", {"text": w, "letter": c}, result)
    result = w[::-1] if kind == "reverse" else w.upper()
    question, reply = source.say(kind, w=w, r=result)
    return _Turn(question, reply, result, kind, {"text": w}, result)


def _program(source: _Source, kind: str) -> _Turn:
    rng = source.rng
    while True:
        program = rng.choice(PROGRAMS)
        name, params = rng.choice(program.names), rng.choice(program.params)
        k = rng.randrange(2, 100) if program.constant else 0
        if source.fits(f"{program.key},{name},{params},{k}", _HELD_OUT_FEW):
            break
    values = slots(program, params, k)
    signature = f"{name}({', '.join(params)})"
    body = program.body.format_map(values)
    what = source.words.programs[program.key].format_map(values)
    question, reply = source.say(kind, sig=signature, what=what, code=f"def {signature}:\n    return {body}")
    return _Turn(question, reply, f"def {name}(", check=check(program, name, k))


def _chat(source: _Source, kind: str) -> _Turn:
    question, reply = source.say(kind)
    return _Turn(question, reply, reply)


_MAKERS: dict[str, Callable[[_Source, str], _Turn]] = {
    "arithmetic": _arithmetic,
    "dates": _dates,
    "strings": _strings,
    "programs": _program,
    "chat": _chat,
}


# --- forms -------------------------------------------------------------------------------------------------------


def _named_tools(rng: Random, form: str, needed: set[str]) -> tuple[str, ...] | None:
    """Which tools the system message names: just the needed, some more, or all. None: no system message at all."""
    if not needed and rng.random() < 0.25:
        return None
    u = rng.random()
    if form == "builtin":
        return () if u < 0.25 else ("wolfram_alpha",)
    if u < 0.3:
        return TOOL_NAMES
    extra = rng.sample(TOOL_NAMES, 1 if u < 0.7 else 2)
    return tuple(name for name in TOOL_NAMES if name in needed or name in extra)


def _call(turn: _Turn, form: str, names: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The tool call in ``form`` and the ipython message's content."""
    arguments = turn.arguments or {}
    if form != "builtin":
        return {"name": turn.tool, "arguments": arguments}, turn.result
    if turn.tool == "calculator" and names:
        return {"name": "wolfram_alpha", "arguments": {"query": arguments["expression"]}}, turn.result
    if turn.tool == "calculator":  # "/" would print 12.0
        arguments = {"expression": turn.expression.replace("/", "//")}
    code = CODE[turn.tool].format_map(arguments)
    return {"name": CODE_INTERPRETER, "arguments": {"code": code}}, interpreter_result(turn.result)


def _exchange(turn: _Turn, form: str, names: tuple[str, ...]) -> tuple[list[Message], dict[str, Any] | None]:
    user = {"role": "user", "content": turn.question}
    last = {"role": "assistant", "content": turn.reply}
    if not turn.tool:
        return [user, last], None
    call, content = _call(turn, form, names)
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [user, asked, {"role": "ipython", "content": content}, last], call


def _assemble(kind: str, lang: str, form: str, turns: Sequence[_Turn], names: tuple[str, ...] | None) -> Dialog:
    """The dialog of ``turns``, the last of ``kind``; ``names``: tools of the system message, None for no message."""
    messages: list[Message] = [] if names is None else [{"role": "system", "content": system_prompt(form, names)}]
    call = None
    for one in turns:
        exchange, call = _exchange(one, form, names or ())
        messages += exchange
    turn = turns[-1]
    return Dialog(
        messages=tuple(messages),
        tools=(),
        form=form,
        lang=lang,
        task=KINDS[kind][0],
        kind=kind,
        answer=turn.answer,
        call=call,
        expression=turn.expression,
        result=turn.result,
        check=turn.check,
    )


def documented(dialog: Dialog) -> Dialog:
    """The same dialog with full JSON schemas for the renderer in place of the short system line (json, function)."""
    if dialog.form == "builtin" or dialog.messages[0]["role"] != "system":
        return dialog
    names = dialog.messages[0]["content"].split(": ", 1)[1].split(", ")
    return replace(dialog, messages=dialog.messages[1:], tools=tuple(CUSTOM_TOOLS[name].schema for name in names))


def training_texts(dialogs: Iterable[Dialog]) -> Iterator[str]:
    """What a tokenizer should see of dialogs: roles, contents and calls as written, each on its own."""
    for dialog in dialogs:
        for message in dialog.messages:
            yield message["role"]
            if message["content"]:
                yield message["content"]
            for call in message.get("tool_calls", ()):
                yield _written(call, dialog.form)


def _written(call: dict[str, Any], form: str) -> str:
    name, arguments = call["name"], call["arguments"]
    if name == CODE_INTERPRETER:
        return arguments["code"]
    if form == "builtin":
        return f"{name}.call({', '.join(f'{key}={json.dumps(value)}' for key, value in arguments.items())})"
    if form == "json":
        return json.dumps({"type": "function", "name": name, "parameters": arguments}, ensure_ascii=False)
    return f"<function={name}>{json.dumps(arguments, ensure_ascii=False)}</function>"


# --- public ------------------------------------------------------------------------------------------------------


def _kinds(tasks: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    chosen = [kind for kind, (task, _) in KINDS.items() if tasks is None or kind in tasks or task in tasks]
    unknown = set(tasks or ()) - set(KINDS) - set(TASKS)
    if unknown or not chosen:
        raise DataError(f"tasks={sorted(unknown)} unknown: choose from {', '.join((*TASKS, *KINDS))}")
    return tuple(chosen), tuple(accumulate(KINDS[kind][1] for kind in chosen))


def _known(what: str, values: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    wrong = [value for value in values if value not in allowed]
    if wrong or not values:
        raise DataError(f"{what}={wrong or list(values)} is not usable: choose from {', '.join(allowed)}")
    return tuple(values)


def make_dialogs(
    n: int,
    seed: int,
    *,
    split: str = "train",
    languages: Sequence[str] = LANGUAGES,
    forms: Sequence[str] = FORMS,
    tasks: Sequence[str] | None = None,
) -> list[Dialog]:
    """``n`` verified dialogs, a pure function of the arguments; the first k of n are the k of the same seed.

    ``split``: ``train`` or ``test`` (other wordings, names and values). ``languages`` and ``forms`` are drawn evenly;
    name one twice to double its share. ``tasks``: tasks or kinds, by default all in the proportions of ``KINDS``.
    Raises DataError for an unknown name.
    """
    (split,) = _known("split", (split,), ("train", "test"))
    languages, forms = _known("languages", languages, LANGUAGES), _known("forms", forms, FORMS)
    kinds, weights = _kinds(tasks)
    rng = Random(f"dialogs {split} {seed}")
    sources = {lang: _Source(rng, load(lang), split, split) for lang in set(languages)}
    dialogs = []
    for _ in range(n):
        lang, form = rng.choice(languages), rng.choice(forms)
        picked = rng.choices(kinds, cum_weights=weights, k=1)
        if split == "train" and rng.random() < _EARLIER_TURN:
            picked = rng.choices(kinds, cum_weights=weights, k=1) + picked
        turns = [_MAKERS[KINDS[kind][0]](sources[lang], kind) for kind in picked]
        names = _named_tools(rng, form, {turn.tool for turn in turns if turn.tool})
        dialogs.append(_assemble(picked[-1], lang, form, turns, names))
    return dialogs


_SHOWCASE = ("mul", "story_sub", "date_after", "program", "identity")


@cache
def showcase_dialogs(lang: str = "en", form: str = "json") -> tuple[Dialog, ...]:
    """Five verified dialogs to show first: wordings as trained, numbers and names held out, every tool named."""
    _known("lang", (lang,), LANGUAGES)
    rng, words = Random(f"showcase {lang}"), load(lang)
    first = {kind: replace(topic, train=((topic.train[0][0],),)) for kind, topic in words.topics.items()}
    source = _Source(rng, replace(words, topics=first), "test", "train")
    names = ("wolfram_alpha",) if form == "builtin" else TOOL_NAMES
    found = []
    for kind in _SHOWCASE:
        turn = _MAKERS[KINDS[kind][0]](source, kind)
        while kind == "mul" and not 5 <= len(turn.expression) <= 6:  # neither 1*7 nor a monster
            turn = _MAKERS[KINDS[kind][0]](source, kind)
        found.append(_assemble(kind, lang, form, (turn,), names))
    return tuple(found)


def showcase(lang: str = "en") -> list[str]:
    """The five questions of ``showcase_dialogs``."""
    return [dialog.prompt[-1]["content"] for dialog in showcase_dialogs(lang)]
