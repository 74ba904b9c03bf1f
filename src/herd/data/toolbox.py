"""The tools that program-made dialogs call: Python functions, their JSON schemas, and short system prompts.

The documented Llama 3.1 tool prompt spends about 150 tokens on instructions and schemas before a question is asked.
A model of a few million parameters with a context of a few hundred tokens learns the same thing from one line that
names the tools and the form of the call, so that line is what the dialogs carry by default; ``SCHEMAS`` holds the
long form for ``render(tools=...)``.

Three forms of a call (Llama 3.1 model card, "prompt formats"):

- ``json``      ``{"name": "calculator", "parameters": {"expression": "12*7"}}``
- ``function``  ``<function=calculator>{"expression": "12*7"}</function>``
- ``builtin``   ``wolfram_alpha.call(query="12*7")``, or Python code for the interpreter; after ``Environment: ipython``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date as _date
from datetime import timedelta
from typing import Any

from ..errors import ToolError
from ..text.chat import tool_output


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression, e.g. ``48*17``."""
    from ..tools import calculator as evaluate

    return evaluate(expression)


def wolfram_alpha(query: str) -> str:
    """The builtin tool's stand-in on this machine: arithmetic only."""
    return calculator(query)


def _day(text: str) -> _date:
    try:
        return _date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ToolError(f"date={text!r} is not a day: write it as YYYY-MM-DD") from None


def add_days(date: str, days: int) -> str:
    """The date ``days`` after ``date`` (before it, if negative)."""
    try:
        return (_day(date) + timedelta(days=int(days))).isoformat()
    except (TypeError, ValueError, OverflowError):
        raise ToolError(f"days={days!r} is not a usable number of days: give a whole number") from None


def days_between(start: str, end: str) -> str:
    """Number of days from ``start`` to ``end``."""
    return str((_day(end) - _day(start)).days)


def weekday(date: str) -> str:
    """The English name of the day of the week."""
    return _day(date).strftime("%A")


def reverse(text: str) -> str:
    """The text from back to front."""
    return str(text)[::-1]


def upper(text: str) -> str:
    """The text in capital letters."""
    return str(text).upper()


def count_letter(text: str, letter: str) -> str:
    """How often ``letter`` occurs in ``text``."""
    return str(str(text).count(str(letter)))


TOOLS: dict[str, Callable[..., str]] = {
    "calculator": calculator,
    "add_days": add_days,
    "days_between": days_between,
    "weekday": weekday,
    "reverse": reverse,
    "upper": upper,
    "count_letter": count_letter,
}
BUILTIN_TOOLS: dict[str, Callable[..., str]] = {"wolfram_alpha": wolfram_alpha}

# What the interpreter runs where the other two forms call a function of ours. Operands stand in the question's order.
_DATES = "from datetime import *\n"
CODE = {
    "calculator": "print({expression})",
    "add_days": _DATES + 'print(date.fromisoformat("{date}") + timedelta({days}))',
    "days_between": _DATES + 'print(abs(date.fromisoformat("{start}") - date.fromisoformat("{end}")).days)',
    "weekday": _DATES + 'print(date.fromisoformat("{date}").strftime("%A"))',
    "reverse": 'print("{text}"[::-1])',
    "upper": 'print("{text}".upper())',
    "count_letter": 'print("{text}".count("{letter}"))',
}

_TYPES = {
    "calculator": {"expression": "string"},
    "add_days": {"date": "string", "days": "integer"},
    "days_between": {"start": "string", "end": "string"},
    "weekday": {"date": "string"},
    "reverse": {"text": "string"},
    "upper": {"text": "string"},
    "count_letter": {"text": "string", "letter": "string"},
}


def _schema(name: str) -> dict[str, Any]:
    properties = {argument: {"type": kind} for argument, kind in _TYPES[name].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    description = (TOOLS[name].__doc__ or "").strip().splitlines()[0].replace("``", "")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SCHEMAS: dict[str, dict[str, Any]] = {name: _schema(name) for name in TOOLS}


def system_prompt(form: str, names: Sequence[str] = tuple(TOOLS)) -> str:
    """The one-line system message of ``form``; ``names`` are tools, ignored by the interpreter's form except that
    ``wolfram_alpha`` is listed unless ``names`` is empty."""
    if form == "builtin":
        return "Environment: ipython\nTools: wolfram_alpha" if names else "Environment: ipython"
    if form == "json":
        return "Tools as JSON: " + ", ".join(names)
    return "Tools as <function>: " + ", ".join(names)


def interpreter_result(stdout: str) -> str:
    """What an ipython message holds after ``print(stdout)`` ran."""
    return tool_output(ok=True, stdout=stdout + "\n")
