"""Generate dialogs that are correct by construction and that a model of a few million parameters can learn.

Every dialog has values that verify it: the expected result of its tool call, the string that its answer must
contain, or hidden asserts for a program. The stream depends only on its arguments, the seed among them. Test
dialogs are held out in three ways at once: they have other wordings, other people's names, and other values
(pairs of operands, dates, words and programs belong to train or test by their hash. A number may occur in
both, but not a pair).

Small models can learn this because it is mostly copying: operands are in the question in the order in which
the call needs them, and numbers and words are written so that the tokenizer splits them in the same way every
time (see ``wordings``). The idea is Llama 3.1's synthetic tool data (arXiv 2407.21783, section 4.3.5), with
templates instead of a large model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice
from random import Random
from typing import Any

from ..errors import DataError
from ..text.llama3_chat import TOOL_CALL_FORMATS, call_text, tool_output
from ..text.messages import CODE_INTERPRETER
from .prompts import CODE, TOOL_NAMES, system_prompt
from .turns import KINDS, TASKS, DialogSource, Turn, make_turn
from .wordings import LANGUAGES, load_wordings

Message = dict[str, Any]

_EARLIER_TURN = 0.05
"""Fraction of training dialogs that begin with another exchange."""


@dataclass(frozen=True)
class Dialog:
    """A dialog and the values that verify it.

    ``messages`` are chat messages (system, user, assistant with ``tool_calls``, ipython, assistant). The
    system message names the tools. ``call`` is the expected ``{"name", "arguments"}`` or None, ``expression``
    the argument of an arithmetic call, ``result`` the tool's value, ``answer`` a string that the last message
    must contain, ``check`` the asserts for a program.
    """

    messages: tuple[Message, ...]
    tool_call_format: str
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
        """The messages up to the last user message: the input of a model under test."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return self.messages[: last + 1]


def _named_tools(rng: Random, tool_call_format: str, needed: set[str]) -> tuple[str, ...] | None:
    """Draw the tools that the system message names (the needed ones and more), or None for no message."""
    if not needed and rng.random() < 0.25:
        return None
    u = rng.random()
    if tool_call_format == "builtin":
        return () if u < 0.25 else ("wolfram_alpha",)
    if u < 0.3:
        return TOOL_NAMES
    extra = rng.sample(TOOL_NAMES, 1 if u < 0.7 else 2)
    return tuple(name for name in TOOL_NAMES if name in needed or name in extra)


def _call(turn: Turn, tool_call_format: str, names: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Return the tool call of ``turn`` in a format, and the content of its ipython message."""
    arguments = turn.arguments or {}
    if tool_call_format != "builtin":
        return {"name": turn.tool, "arguments": arguments}, turn.result
    if turn.tool == "calculator" and names:
        return {"name": "wolfram_alpha", "arguments": {"query": arguments["expression"]}}, turn.result
    if turn.tool == "calculator":  # Python's "/" would print 12.0
        arguments = {"expression": turn.expression.replace("/", "//")}
    code = CODE[turn.tool].format_map(arguments)
    printed = tool_output(ok=True, stdout=f"{turn.result}\n")
    return {"name": CODE_INTERPRETER, "arguments": {"code": code}}, printed


def _exchange(
    turn: Turn, tool_call_format: str, names: tuple[str, ...]
) -> tuple[list[Message], dict[str, Any] | None]:
    user = {"role": "user", "content": turn.question}
    last = {"role": "assistant", "content": turn.reply}
    if not turn.tool:
        return [user, last], None
    call, content = _call(turn, tool_call_format, names)
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [user, calling, {"role": "ipython", "content": content}, last], call


def _assemble(
    kind: str, lang: str, tool_call_format: str, turns: Sequence[Turn], names: tuple[str, ...] | None
) -> Dialog:
    """Return the dialog of ``turns``. ``names`` are the tools of the system message, or None for no message.

    The last turn is of ``kind``.
    """
    messages: list[Message] = (
        [] if names is None else [{"role": "system", "content": system_prompt(tool_call_format, names)}]
    )
    call = None
    for each in turns:
        exchange, call = _exchange(each, tool_call_format, names or ())
        messages += exchange
    turn = turns[-1]
    return Dialog(
        messages=tuple(messages),
        tool_call_format=tool_call_format,
        lang=lang,
        task=KINDS[kind][0],
        kind=kind,
        answer=turn.answer,
        call=call,
        expression=turn.expression,
        result=turn.result,
        check=turn.check,
    )


def training_texts(dialogs: Iterable[Dialog]) -> Iterator[str]:
    """Yield the roles, contents and formatted calls of dialogs, as texts to train a tokenizer."""
    for dialog in dialogs:
        for message in dialog.messages:
            yield message["role"]
            if message["content"]:
                yield message["content"]
            for call in message.get("tool_calls", ()):
                name, arguments = call["name"], call["arguments"]
                is_code = name == CODE_INTERPRETER
                yield arguments["code"] if is_code else call_text(name, arguments, dialog.tool_call_format)


def _kinds(tasks: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the kinds of dialog of some tasks or kinds (None: all), and their cumulative weights."""
    names = TASKS if tasks is None else _require_known("tasks", tasks, (*TASKS, *KINDS))
    chosen = [kind for kind, (task, _) in KINDS.items() if kind in names or task in names]
    return tuple(chosen), tuple(accumulate(KINDS[kind][1] for kind in chosen))


def _require_known(argument: str, values: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Return ``values``. Raises DataError if there are none, or if one is not among ``allowed``."""
    choices = f"choose from {', '.join(allowed)}"
    if not values:
        raise DataError(f"{argument} is empty: {choices}")
    if unknown := [value for value in values if value not in allowed]:
        raise DataError(f"{argument} {', '.join(map(repr, unknown))} unknown: {choices}")
    return tuple(values)


def make_dialogs(n: int, seed: int, **choices: Any) -> list[Dialog]:
    """Return the first ``n`` dialogs of `stream_dialogs`."""
    return list(islice(stream_dialogs(seed, **choices), n))


def stream_dialogs(
    seed: int,
    *,
    split: str = "train",
    languages: Sequence[str] = LANGUAGES,
    tool_call_formats: Sequence[str] = TOOL_CALL_FORMATS,
    tasks: Sequence[str] | None = None,
) -> Iterator[Dialog]:
    """Yield dialogs without end, the same for the same arguments.

    ``split`` is ``train`` or ``test`` (other wordings, names and values). ``languages`` and
    ``tool_call_formats`` are drawn with equal probability: name one twice to double it. ``tasks`` are tasks
    or kinds (None: all), in the proportions of ``KINDS``. Raises DataError for an unknown name or none.
    """
    (split,) = _require_known("split", (split,), ("train", "test"))
    languages = _require_known("languages", languages, LANGUAGES)
    tool_call_formats = _require_known("tool_call_formats", tool_call_formats, TOOL_CALL_FORMATS)
    kinds, weights = _kinds(tasks)
    rng = Random(f"dialogs {split} {seed}")
    sources = {lang: DialogSource(rng, load_wordings(lang), split, split) for lang in set(languages)}
    while True:
        lang, tool_call_format = rng.choice(languages), rng.choice(tool_call_formats)
        turn_kinds = rng.choices(kinds, cum_weights=weights, k=1)
        if split == "train" and rng.random() < _EARLIER_TURN:
            turn_kinds = rng.choices(kinds, cum_weights=weights, k=1) + turn_kinds
        turns = [make_turn(sources[lang], kind) for kind in turn_kinds]
        names = _named_tools(rng, tool_call_format, {turn.tool for turn in turns if turn.tool})
        yield _assemble(turn_kinds[-1], lang, tool_call_format, turns, names)


_SHOWCASE = ("mul", "story_sub", "date_after", "program", "identity")


@cache
def showcase_dialogs(lang: str = "en", tool_call_format: str = "json") -> tuple[Dialog, ...]:
    """Return five dialogs that introduce a model: training wordings, held-out values, all tools named.

    Raises DataError for an unknown language or format.
    """
    _require_known("lang", (lang,), LANGUAGES)
    _require_known("tool_call_format", (tool_call_format,), TOOL_CALL_FORMATS)
    rng, words = Random(f"showcase {lang}"), load_wordings(lang)
    first = {kind: replace(topic, train=((topic.train[0][0],),)) for kind, topic in words.topics.items()}
    source = DialogSource(rng, replace(words, topics=first), "test", "train")
    names = ("wolfram_alpha",) if tool_call_format == "builtin" else TOOL_NAMES
    dialogs = []
    for kind in _SHOWCASE:
        turn = make_turn(source, kind)
        while kind == "mul" and not 5 <= len(turn.expression) <= 6:  # neither trivial nor huge
            turn = make_turn(source, kind)
        dialogs.append(_assemble(kind, lang, tool_call_format, (turn,), names))
    return tuple(dialogs)
