"""Grammars of tool calls, matched one character at a time for `toolcall.ToolCallParser`.

A grammar is a coroutine. It is sent one character after another (``c = yield`` waits for the next one),
returns a `Match` when it has seen enough, and raises `NotACall` at the first character that cannot belong to
a call. It remembers its own position, so a parser that is given text in pieces reads nothing twice.

Values are read the way models write them: strings in double or single quotes and with raw line breaks,
``True`` next to ``true``, a trailing comma.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from .messages import TOOL_NAME, json_problem

PYTHON_TAG = "<|python_tag|>"
END_MARKERS = ("<|eom_id|>", "<|eot_id|>")
FUNCTION = "<function="
FUNCTION_END = "</function>"
FENCE = "```"
TOOL_CALLS = "[TOOL_CALLS]"
ARGS = "[ARGS]"
WRAPPERS = {
    **{
        f"<{word}>": f"</{word}>"
        for word in ("tool_call", "tool_calls", "function_call", "function_calls", "functioncall")
    },
    "<|tool_call|>": "<|/tool_call|>",
    "<|python_start|>": "<|python_end|>",
    TOOL_CALLS: "</s>",
    FENCE: FENCE,
}
"""What models put around calls: Hermes and Qwen ``<tool_call>``, Phi ``<|tool_call|>``, Llama 4
``<|python_start|>``, Mistral ``[TOOL_CALLS]``."""
WHITE_SPACE = " \t\r\n"
MAX_DEPTH = 64  # of nested arguments; Python's own JSON parser fails near 1000

_TAGS = (PYTHON_TAG, *END_MARKERS, FUNCTION, FUNCTION_END, *WRAPPERS, *WRAPPERS.values())
_QUOTES = ("'", '"')
_NAME_KEYS = ("name", "function", "tool_name", "tool")
_ARGUMENT_KEYS = ("parameters", "arguments", "args", "params", "input")
_NESTING_KEYS = ("tool_calls", "tool_call", "function_call")
"""Keys under which an object has a call or a list of calls, as in the messages of OpenAI's API."""
_CALL_KEYS = (*_NAME_KEYS, *_ARGUMENT_KEYS, *_NESTING_KEYS, "type", "id")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_END = "\0"
_FIRST_KEY = re.compile(rf"""\[?\s*\{{\s*["'](?:{"|".join(_CALL_KEYS)})["']\s*:""")
_TYPE = re.compile(r"""["']type["']\s*:\s*["']function["']""")
_NAME = re.compile(r"""["']name["']\s*:\s*["']""")
_PARAMETERS = re.compile(rf"""["'](?:{"|".join(_ARGUMENT_KEYS)})["']\s*:""")

T = TypeVar("T")
Reader = Generator[None, str, T]
"""A part of a grammar, which returns a value. A part that cannot know its end without looking at the
character after it returns that character as well."""


@dataclass(frozen=True)
class ToolCall:
    """A call with its arguments, and the format it was written in: "json", "builtin" or "function"."""

    name: str
    arguments: dict[str, Any]
    tool_call_format: str

    def to_dict(self) -> dict[str, Any]:
        """Return the call as an element of a message's ``tool_calls``."""
        return {"name": self.name, "arguments": self.arguments, "tool_call_format": self.tool_call_format}


@dataclass(frozen=True)
class Match:
    """Calls, or a ``tag`` around calls. ``ahead``: the last character sent comes after the match.

    ``certain``: the text says that these are calls, whatever their names.
    """

    calls: tuple[ToolCall, ...] = ()
    tag: str = ""
    ahead: bool = False
    certain: bool = False


class NotACall(Exception):
    """Raised if text cannot be a call. ``reason`` is empty for text that was never meant as one."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason


# Grammars. Each begins after its first character, by which the parser chose it.


def json_call() -> Reader[Match]:
    """Match a JSON object whose first key is one that a call may have, after its ``{``."""
    return _read_calls([(yield from _call_object())])


def bracketed_calls(pythonic: bool) -> Reader[Match]:
    """Match the list of calls after ``[``: JSON objects, or if ``pythonic`` ``f(x="y"), g()``."""
    objects: list[Any] = []
    calls: list[ToolCall] = []
    c = yield from _skip((yield))
    written_in_json = c == "{"
    if not (written_in_json or pythonic or c == TOOL_CALLS[1]):
        raise NotACall
    while c != "]":
        if written_in_json:
            if c != "{":
                raise NotACall(f"'{{' expected, not {c!r}")
            objects.append((yield from _call_object()))
        else:
            name, c = yield from _identifier(c, ".")
            if f"[{name}{c}" == TOOL_CALLS and not calls:
                return Match(tag=TOOL_CALLS)
            if c != "(" or not pythonic:
                raise NotACall
            arguments = yield from _keyword_arguments(name)
            calls.append(_checked(name.removesuffix(".call"), arguments, "json"))
        c = yield from _separator((yield from _skip((yield))), "]")
    if not calls and not objects:
        raise NotACall
    return Match(tuple(calls)) if calls else _read_calls(objects)


def tag() -> Reader[Match]:
    """Match a special token that is spelled out, a wrapper, or ``<function=name>{…}``, after its ``<``."""
    text = "<"
    while text not in _TAGS:
        text += yield
        if not any(tag.startswith(text) for tag in _TAGS):
            raise NotACall
    if text != FUNCTION:
        return Match(tag=text)
    name = ""
    while (c := (yield)) != ">":
        name += c
        if not TOOL_NAME.fullmatch(name):
            raise NotACall(f"{name[:40]!r} is no function name")
    c = yield from _skip((yield))
    if c != "{":
        raise NotACall("<function=name> must be followed by a JSON object")
    arguments = yield from _members((yield from _skip((yield))), 1)
    return Match((_checked(name, arguments, "function"),), certain=True)


def fence(closing: bool) -> Reader[Match]:
    """Match the three backticks of a fence after the first one, and the language behind an opening fence."""
    for _ in FENCE[1:]:
        if (yield) != "`":
            raise NotACall
    if closing:
        return Match(tag=FENCE)
    while (c := (yield)) in "_-+." or c.isalnum():
        pass
    if c not in WHITE_SPACE and c not in "{[<":
        raise NotACall
    return Match(tag=FENCE, ahead=True)


def builtin_call(first: str) -> Reader[Match]:
    """Match ``name.call(key=value, …)``, or Mistral's ``name[ARGS]{…}``, after the name's first letter.

    Text that continues directly after the closing bracket of the first form is code, not a call.
    """
    name, c = yield from _identifier(first, "-")
    if c == "[":
        yield from _literal(ARGS[1:])
        if (yield from _skip((yield))) != "{":
            raise NotACall(f"{ARGS} must be followed by a JSON object")
        arguments = yield from _members((yield from _skip((yield))), 1)
        return Match((_checked(name, arguments, "json"),), certain=True)
    for expected in ".call":
        if c != expected:
            raise NotACall
        c = yield
    if c != "(":
        raise NotACall
    call = _checked(name, (yield from _keyword_arguments(name)), "builtin")
    if (yield) not in WHITE_SPACE + ";<`":  # `name.call(x=1).other` is code
        raise NotACall
    return Match((call,), ahead=True)


# Parts of grammars


def _literal(text: str) -> Reader[None]:
    """Read exactly ``text``."""
    for expected in text:
        if (yield) != expected:
            raise NotACall


def _call_object() -> Reader[dict[str, Any]]:
    """Read an object, after its ``{``, whose first key is one that a call may have."""
    quote = yield from _skip((yield))
    if quote not in _QUOTES:
        raise NotACall
    key = ""
    while (c := (yield)) != quote:
        key += c
        if not any(word.startswith(key) for word in _CALL_KEYS):
            raise NotACall
    c = yield from _skip((yield))
    if key not in _CALL_KEYS or c != ":":
        raise NotACall
    value, c = yield from _value((yield from _skip((yield))), 1)
    rest = yield from _members((yield from _separator(c, "}")), 1)
    return {key: value, **rest}


def _keyword_arguments(name: str) -> Reader[dict[str, Any]]:
    """Read ``key=value, …)``."""
    arguments: dict[str, Any] = {}
    c = yield from _skip((yield))
    while c != ")":
        key, c = yield from _identifier(c)
        if (yield from _skip(c)) != "=":
            raise NotACall
        value, c = yield from _value((yield from _skip((yield))), 0)
        c = yield from _separator(c, ")")
        if key in arguments:
            raise NotACall(f"{name} is given {key} twice")
        arguments[key] = value
    return arguments


def _identifier(c: str, more: str = "") -> Reader[tuple[str, str]]:
    """Read an ASCII identifier that begins with ``c`` and may have ``more``, and the character after it."""
    if not starts_identifier(c):
        raise NotACall
    name = ""
    while c == "_" or (c.isascii() and c.isalnum()) or c in more:
        name += c
        c = yield
    return name, c


def starts_identifier(c: str) -> bool:
    """Return whether a Python identifier in ASCII may begin with ``c``."""
    return c == "_" or (c.isascii() and c.isalpha())


def _skip(c: str) -> Reader[str]:
    """Return the first character from ``c`` on that is not white space."""
    while c in WHITE_SPACE:
        c = yield
    return c


def _separator(c: str, close: str) -> Reader[str]:
    """Pass a comma and return the character after it, or return ``close``."""
    if c == ",":
        return (yield from _skip((yield)))
    if c != close:
        raise NotACall(f"',' or {close!r} expected, not {c!r}")
    return c


def _value(c: str, depth: int) -> Reader[tuple[Any, str]]:
    """Read a value that begins with ``c``, and the character after it and its white space."""
    value: Any
    if c in _QUOTES:
        value = yield from _string(c)
    elif c in "{[":
        if depth == MAX_DEPTH:
            raise NotACall(f"nested more than {MAX_DEPTH} deep")
        first = yield from _skip((yield))
        value = yield from (_members if c == "{" else _items)(first, depth + 1)
    elif c == "-" or (c.isascii() and c.isalnum()):
        word = c
        while (c := (yield)) in "+-." or (c.isascii() and c.isalnum()):
            word += c
        return (_WORDS[word] if word in _WORDS else _json(word)), (yield from _skip(c))
    else:
        raise NotACall(f"a value expected, not {c!r}")
    return value, (yield from _skip((yield)))


def _string(quote: str) -> Reader[str]:
    """Read the rest of a string, to its closing quote."""
    parts = ['"']
    while (c := (yield)) != quote:
        if c == "\\":
            c += yield
            c = "'" if c == "\\'" else c
        elif c == '"':
            c = '\\"'
        parts.append(c)
    return _json("".join(parts) + '"')


def _json(text: str) -> Any:
    try:
        return json.loads(text, strict=False)  # strict JSON refuses raw line breaks in strings
    except (ValueError, RecursionError) as error:
        raise NotACall(json_problem(error)) from error


def _members(c: str, depth: int) -> Reader[dict[str, Any]]:
    """Read the members of an object from the first character ``c`` on, to the ``}``."""
    members: dict[str, Any] = {}
    while c != "}":
        if c not in _QUOTES:
            raise NotACall(f"a key in quotes expected, not {c!r}")
        key = yield from _string(c)
        c = yield from _skip((yield))
        if c != ":":
            raise NotACall(f"':' expected, not {c!r}")
        members[key], c = yield from _value((yield from _skip((yield))), depth)
        c = yield from _separator(c, "}")
    return members


def _items(c: str, depth: int) -> Reader[list[Any]]:
    """Read the items of an array from the first character ``c`` on, to the ``]``."""
    items: list[Any] = []
    while c != "]":
        item, c = yield from _value(c, depth)
        c = yield from _separator(c, "]")
        items.append(item)
    return items


# From values to calls


def _read_calls(values: list[Any]) -> Match:
    """Return the calls that JSON objects describe. Each is a call or has calls under one of its keys."""
    calls: list[ToolCall] = []
    certain = False
    for value in values:
        nesting = next((key for key in _NESTING_KEYS if key in value), None)
        if nesting is None:
            call, is_marked = _read_call(value)
            calls.append(call)
            certain |= is_marked
            continue
        inner = value[nesting] if isinstance(value[nesting], list) else [value[nesting]]
        others = value.keys() - {nesting, "id", "type"}
        if not all(isinstance(each, dict) for each in inner) or any(value[key] for key in others):
            raise NotACall
        calls += _read_calls(inner).calls
        certain = True
    if not calls:
        raise NotACall
    return Match(tuple(calls), certain=certain)


def _read_call(value: dict[str, Any]) -> tuple[ToolCall, bool]:
    """Return the call that a JSON object describes, and whether the object says that it is a call.

    Understood are ``{"name", "parameters"}``, OpenAI's ``{"function": {"name", "arguments"}}``, and the name
    as ``"function"`` or ``"tool"``. Parameters may be an object, an object written as a string, null, or
    absent where nothing but the name is there.
    """
    function = value.get("function")
    parts = (function, value) if isinstance(function, dict) else (value,)
    names = [part[key] for part in parts for key in _NAME_KEYS if isinstance(part.get(key), str)]
    name = names[0] if names else None
    given = [part[key] for part in parts for key in _ARGUMENT_KEYS if key in part]
    is_typed = value.get("type") == "function"
    if not given and not is_typed and any(part.keys() - {*_NAME_KEYS} for part in parts):
        raise NotACall
    was_meant = is_typed or bool(given and name is not None)
    if name is None or not TOOL_NAME.fullmatch(name):
        raise NotACall(f"{str(name)[:40]!r} is no function name" if was_meant else "")
    arguments = given[0] if given else None
    if isinstance(arguments, str):
        arguments = _read_text(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        raise NotACall(f"parameters of {name} are {kind}, not an object" if was_meant else "")
    return _checked(name, arguments, "json"), is_typed or isinstance(function, dict)


def _read_text(text: str) -> Any:
    """Return the value that ``text`` spells, None for blank text, and other text itself."""
    stripped = text.strip(WHITE_SPACE)
    if not stripped:
        return None
    reader = _value(stripped[0], 0)
    try:
        next(reader)
        for c in stripped[1:] + _END:
            reader.send(c)
    except StopIteration as stop:
        value, after = stop.value
        return value if after == _END else text
    except NotACall:
        pass
    return text


def _checked(name: str, arguments: dict[str, Any], tool_call_format: str) -> ToolCall:
    """Return the call unless its arguments could not be written again: a lone surrogate, NaN or infinity."""
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError as error:
        raise NotACall(f"arguments of {name}: {error}") from error
    return ToolCall(name, arguments, tool_call_format)


def was_meant_as_call(text: str, *, first: bool, ended: bool) -> bool:
    """Return whether rejected text was meant as a call.

    JSON was if it names a function with parameters, or if a message begins with it. The grammars of the other
    formats give a reason only where it was, except for text that has ended too soon (``ended``).
    """
    if text.startswith(("{", "[")):
        names_a_function = _TYPE.search(text) or (_NAME.search(text) and _PARAMETERS.search(text))
        return bool(names_a_function) or (first and _FIRST_KEY.match(text) is not None)
    if text.startswith("<"):
        return text.startswith(FUNCTION)
    return not ended or re.match(r"\w+\.call\(\s*\w+\s*=", text) is not None
