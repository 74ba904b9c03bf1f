"""BFCL: compare function calls with the expected ones by name and arguments, without running anything.

For every argument the data set lists the possible values ("" in the list: the argument is optional). A call
is right if its function is right, no required argument is missing, no argument is unknown, and every value
has the right type and is in the list. Texts are compared without case, spaces and the marks ``, . / - _ *
^``. If several calls are expected, each must match one of them, in any order. If no function fits the
question (*irrelevance*), any call is wrong.

Decisions equal those of the Berkeley Function-Calling Leaderboard's checker for Python functions. For
example, an integer is accepted for a float, but not the other way round. One thing differs: if the data lists
no value at all for a required argument (two items), the empty value is right here, and their checker accepts
no call. Source: Patil et al., "The Berkeley Function Calling Leaderboard" (ICML 2025); ShishirPatil/gorilla.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..text.toolcall_grammar import ToolCall

Schema = Mapping[str, Any]
Expected = Mapping[str, Mapping[str, Sequence[Any]]]
"""An expected call: {function: {argument: possible values}}."""

_TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
    "dict": dict, "any": str,
}  # fmt: skip
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_IGNORED = re.compile(r"[ ,./\-_*^]")


def why_wrong(calls: Sequence[ToolCall], functions: Sequence[Schema], expected: Sequence[Expected]) -> str:
    """Return the reason why the calls are wrong, or "" if they are right.

    If none is expected, any call is wrong.
    """
    if not expected:
        return f"calls {calls[0].name} where no function fits" if calls else ""
    if len(calls) != len(expected):
        return f"{len(calls)} calls instead of {len(expected)}"
    left = list(calls)
    for one in expected:
        name = next(iter(one))
        schema = next(function for function in functions if function["name"] == name)
        reasons = [_difference(call, schema, one[name]) for call in left]
        if all(reasons):
            return reasons[0] if len(expected) == 1 else f"no call matches {name}: {'; '.join(reasons)}"
        del left[reasons.index("")]
    return ""


def tool_schema(function: Schema) -> dict[str, Any]:
    """Return a function of the data set as a JSON schema. The data set uses Python's names of types."""
    return {key: function[key] for key in ("name", "description")} | {
        "parameters": _as_json(function["parameters"])
    }


def _as_json(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_as_json(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _as_json(value) for key, value in schema.items()}
    if isinstance(schema.get("type"), str):
        out["type"] = _JSON_TYPES.get(schema["type"], schema["type"])
    return out


def _difference(call: ToolCall, schema: Schema, expected: Mapping[str, Sequence[Any]]) -> str:
    """Return the reason why a call differs from the expected one, or "" if it does not."""
    parameters = schema["parameters"]
    if call.name != schema["name"]:
        return f"calls {call.name}, not {schema['name']}"
    for name in parameters["required"]:
        if name not in call.arguments:
            return f"{name} is missing"
    for name, value in call.arguments.items():
        if name not in parameters["properties"] or name not in expected:
            return f"{call.name} has no argument {name}"
        if why := _value_difference(name, value, parameters["properties"][name], expected[name]):
            return why
    for name, values in expected.items():
        if name not in call.arguments and "" not in values:
            return f"{name} is missing"
    return ""


def _value_difference(name: str, value: Any, schema: Schema, possible: Sequence[Any]) -> str:
    wanted = _TYPES[schema["type"]]
    possible = possible or [wanted()]  # two items list no value, and mean the empty one
    nested = _TYPES[schema["items"]["type"]] if schema["type"] in ("array", "tuple") else None
    if wanted is float and type(value) is int:
        value = float(value)
    if not _has_type(value, possible, wanted, nested):
        return f"{name} is {_brief(value)}, not of type {schema['type']}"
    if _listed_type(possible) not in (None, wanted):  # the listed values are names of variables
        right = value in possible
    elif wanted is dict:
        right = any(_same_dict(value, one) for one in possible if one != "")
    elif wanted is list and nested is dict:
        right = any(len(value) == len(one) and all(map(_same_dict, value, one)) for one in possible)
    elif wanted in (str, list):
        empty: Any = wanted()
        right = _standard(value) in [_standard(one or empty) for one in possible]
    else:
        right = value in possible
    return "" if right else f"{name} is {_brief(value)}, not among {_brief(possible)}"


def _has_type(value: Any, possible: Sequence[Any], wanted: type, nested: type | None) -> bool:
    """Return whether a value and its items have the schema's types, or the type of the listed values."""
    items: Any = value
    if type(value) is wanted:
        if nested is None:
            return True
        for one in possible:
            # a listed "" (the argument is optional) allows any items
            if not isinstance(one, list) or all(_has_type(item, one, nested, None) for item in items):
                return True
    return type(value) is _listed_type(possible)


def _listed_type(possible: Sequence[Any]) -> type | None:
    return next((type(one) for one in possible if one != ""), None)


def _same_dict(value: Any, possible: Any) -> bool:
    """Return whether every key has one of its listed values, and no required key is missing."""
    if not isinstance(value, dict) or not isinstance(possible, dict) or not value.keys() <= possible.keys():
        return False
    if any(_standard_text(one) not in map(_standard_text, possible[key]) for key, one in value.items()):
        return False
    return all(key in value or "" in values for key, values in possible.items())


def _standard(value: Any) -> Any:
    """Return a text, or the texts of a list, normalized for comparison."""
    return [_standard_text(item) for item in value] if isinstance(value, list) else _standard_text(value)


def _standard_text(value: Any) -> Any:
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
