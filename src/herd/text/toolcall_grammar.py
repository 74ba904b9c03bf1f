"""What a tool call looks like, character by character: the grammars behind `toolcall.ToolCallParser`.

A grammar is a coroutine that is sent one character after another (``c = yield`` waits for the next), returns the kind
of call once it has its last character, and raises `NotACall` at the first one that cannot belong to a call. It
remembers where it is by itself, so a parser that is given text in pieces reads nothing twice. The readers below then
turn the whole text of a candidate into a name and arguments; JSON proper is Python's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from .chat import TOOL_NAME

PYTHON_TAG = "<|python_tag|>"
END_MARKERS = ("<|eom_id|>", "<|eot_id|>")
FUNCTION = "<function="
FUNCTION_END = "</function>"
SPACE = " \t\r\n"
MAX_DEPTH = 64  # nesting of arguments; Python's own parser gives up near 1000

_TAGS = (PYTHON_TAG, *END_MARKERS, FUNCTION, FUNCTION_END)
_CALL_KEYS = ("name", "type", "function", "parameters", "arguments", "id")
_FIRST_KEY = re.compile(r'\{\s*"(?:name|type|function|parameters|arguments|id)"\s*:')
_TYPE = re.compile(r'"type"\s*:\s*"function"')
_NAME = re.compile(r'"name"\s*:\s*"')
_PARAMETERS = re.compile(r'"(?:parameters|arguments)"\s*:')
_PAIR = re.compile(r"[\s,]*([A-Za-z_]\w*)\s*=\s*", re.ASCII)
_DECODER = json.JSONDecoder(strict=False)  # models do write raw line breaks within strings


@dataclass(frozen=True)
class ToolCall:
    """One call: ``tool_call_format`` is "json", "builtin" or "function", the way it was written."""

    name: str
    arguments: dict[str, Any]
    tool_call_format: str


class NotACall(Exception):
    """The candidate is no call; ``reason`` says why for one that was clearly meant so, and is empty for plain text."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason


Candidate = Generator[None, str, str]
_Scan = Generator[None, str, None]
_ScanOn = Generator[None, str, str]


# The grammars. Parts that cannot know their end without looking further return the character after it.


def json_call() -> Candidate:
    """A JSON object whose first key is one a call may have; its ``{`` has been taken."""
    c = yield from _skip((yield))
    if c != '"':
        raise NotACall
    word = ""
    while (c := (yield)) != '"':
        word += c
        if not any(key.startswith(word) for key in _CALL_KEYS):
            raise NotACall
    c = yield from _skip((yield))
    if word not in _CALL_KEYS or c != ":":
        raise NotACall
    c = yield from _skip((yield))
    c = yield from _skip((yield from _value(c, 1)))
    yield from _members(c, 1)
    return "json"


def tag() -> Candidate:
    """A special token spelled out, or a call of the function form; its ``<`` has been taken."""
    text = "<"
    while text not in _TAGS:
        text += yield
        if not any(tag.startswith(text) for tag in _TAGS):
            raise NotACall
    if text != FUNCTION:
        return text
    name = ""
    while (c := (yield)) != ">":
        name += c
        if not TOOL_NAME.fullmatch(name):
            raise NotACall(f"{name[:40]!r} is no function name")
    c = yield from _skip((yield))
    if c != "{":
        raise NotACall("<function=name> must be followed by a JSON object")
    yield from _object(1)
    return "function"


def builtin_call() -> Candidate:
    """``name.call(key=value, …)``; the first letter of the name has been taken."""
    c = yield
    while c == "_" or (c.isascii() and c.isalnum()):
        c = yield
    for expected in ".call(":
        if c != expected:
            raise NotACall
        c = yield
    c = yield from _skip(c)
    while c != ")":
        if not (c == "_" or (c.isascii() and c.isalpha())):
            raise NotACall
        while c == "_" or (c.isascii() and c.isalnum()):
            c = yield
        c = yield from _skip(c)
        if c != "=":
            raise NotACall
        c = yield from _skip((yield))
        c = yield from _skip((yield from _value(c, 0)))
        if c == ",":
            c = yield from _skip((yield))
        elif c != ")":
            raise NotACall(f"',' or ')' expected, not {c!r}")
    return "builtin"


def _skip(c: str) -> _ScanOn:
    """The first character from ``c`` on that is no white space."""
    while c in SPACE:
        c = yield
    return c


def _value(c: str, depth: int) -> _ScanOn:
    """A JSON value that begins with ``c``; returns the character after it."""
    if c == '"':
        yield from _string()
    elif c == "{":
        yield from _object(depth + 1)
    elif c == "[":
        yield from _array(depth + 1)
    elif c == "-" or (c.isascii() and c.isalnum()):
        c = yield
        while c in "+-." or (c.isascii() and c.isalnum()):
            c = yield
        return c
    else:
        raise NotACall(f"a value expected, not {c!r}")
    return (yield)


def _string() -> _Scan:
    """The rest of a string, to its closing quote."""
    while (c := (yield)) != '"':
        if c == "\\":
            yield


def _object(depth: int) -> _Scan:
    """The rest of an object, to its ``}``."""
    _check_depth(depth)
    c = yield from _skip((yield))
    if c == "}":
        return
    c = yield from _member(c, depth)
    yield from _members(c, depth)


def _members(c: str, depth: int) -> _Scan:
    """The rest of an object after a member; ``c`` is the character after that."""
    while c != "}":
        if c != ",":
            raise NotACall(f"',' or '}}' expected, not {c!r}")
        c = yield from _member((yield from _skip((yield))), depth)


def _member(c: str, depth: int) -> _ScanOn:
    """``"key": value`` that begins with ``c``; returns the character after it and its white space."""
    if c != '"':
        raise NotACall(f"a key in double quotes expected, not {c!r}")
    yield from _string()
    c = yield from _skip((yield))
    if c != ":":
        raise NotACall(f"':' expected, not {c!r}")
    c = yield from _value((yield from _skip((yield))), depth)
    return (yield from _skip(c))


def _array(depth: int) -> _Scan:
    """The rest of an array, to its ``]``."""
    _check_depth(depth)
    c = yield from _skip((yield))
    if c == "]":
        return
    while True:
        c = yield from _skip((yield from _value(c, depth)))
        if c == "]":
            return
        if c != ",":
            raise NotACall(f"',' or ']' expected, not {c!r}")
        c = yield from _skip((yield))


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise NotACall(f"nested more than {MAX_DEPTH} deep")


# From a candidate's whole text to a call


def _read_json(text: str) -> ToolCall:
    meant = _names_a_function(text)
    try:
        value = _DECODER.decode(text)
        inner = value["function"] if isinstance(value.get("function"), dict) else value
        name = inner.get("name")
        arguments = inner["parameters"] if "parameters" in inner else inner.get("arguments")
    except (ValueError, RecursionError) as error:
        raise NotACall(f"malformed call: {error}" if meant else "") from error
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise NotACall(f"malformed call: {str(name)[:40]!r} is no function name" if meant else "")
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        raise NotACall(f"malformed call: parameters of {name} are {kind}, not an object" if meant else "")
    return _checked(ToolCall(name, arguments, "json"))


def _read_function(text: str) -> ToolCall:
    name, _, arguments = text.removeprefix(FUNCTION).partition(">")
    try:
        return _checked(ToolCall(name, _DECODER.decode(arguments.strip(SPACE)), "function"))
    except (ValueError, RecursionError) as error:
        raise NotACall(f"malformed call: arguments of {name}: {error}") from error


def _read_builtin(text: str) -> ToolCall:
    name, _, rest = text.partition(".call(")
    arguments: dict[str, Any] = {}
    position = 0
    while pair := _PAIR.match(rest, position):
        try:
            value, position = _python_or_json(rest, pair.end())
        except (ValueError, RecursionError) as error:
            raise NotACall(f"malformed call: {pair[1]} of {name}: {error}") from error
        if pair[1] in arguments:
            raise NotACall(f"malformed call: {name} is given {pair[1]} twice")
        arguments[pair[1]] = value
    return _checked(ToolCall(name, arguments, "builtin"))


def _python_or_json(text: str, position: int) -> tuple[Any, int]:
    for word, value in (("True", True), ("False", False), ("None", None)):
        if text.startswith(word, position):
            return value, position + len(word)
    return _DECODER.raw_decode(text, position)


def _checked(call: ToolCall) -> ToolCall:
    """The call, unless its arguments hold what could not be written again: a lone surrogate, NaN or infinity."""
    try:
        json.dumps(call.arguments, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError as error:
        raise NotACall(f"malformed call: arguments of {call.name}: {error}") from error
    return call


READ = {"json": _read_json, "function": _read_function, "builtin": _read_builtin}


def was_meant(text: str, *, first: bool, ended: bool) -> bool:
    """Was this rejected candidate meant as a call? JSON is so if it names a function with parameters, or if the message
    begins with it; of the other forms the grammar gives a reason only then, or the text has come far enough."""
    if text.startswith("{"):
        return _names_a_function(text) or (first and _FIRST_KEY.match(text) is not None)
    if text.startswith("<"):
        return text.startswith(FUNCTION)
    return not ended or re.match(r"\w+\.call\(\s*\w+\s*=", text) is not None


def _names_a_function(text: str) -> bool:
    return bool(_TYPE.search(text) or (_NAME.search(text) and _PARAMETERS.search(text)))
