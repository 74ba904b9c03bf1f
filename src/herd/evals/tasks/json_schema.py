"""Check a JSON value against a JSON Schema (draft 2020-12).

A schema with a keyword that cannot be checked is refused, so no answer counts as right by mistake.
Annotations (``title``, ``description``, ``format``, …) restrict nothing, as the standard says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from ...errors import DataError
from .patterns import check_pattern, find

_ANNOTATIONS = (
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "format", "deprecated", "readOnly", "writeOnly",
)  # fmt: skip
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
}
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "is below the minimum"),
    "maximum": (lambda value, bound: value <= bound, "is above the maximum"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "is not above"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "is not below"),
    "multipleOf": (lambda value, step: not Fraction(str(value)) % Fraction(str(step)), "is no multiple of"),
}
_SIZES = {"Length": str, "Items": list, "Properties": dict}
"""The types of value that ``minLength``, ``maxLength`` and so on restrict."""
_COUNTS = tuple(f"{end}{kind}" for end in ("min", "max") for kind in _SIZES)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SINGLE = ("items", "additionalProperties", "propertyNames", "contains", "not")
"""Keywords whose value is a list of schemas, an object of schemas, and one schema."""
_KEYWORDS = {
    *_ANNOTATIONS, *_BOUNDS, *_COUNTS, *_LISTS, *_MAPS, *_SINGLE,
    "$ref", "type", "enum", "const", "pattern", "required", "uniqueItems",
}  # fmt: skip

_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_BOUNDS, (lambda value: _is_number(value) and math.isfinite(value), "a number")),
    "multipleOf": (lambda value: _is_number(value) and 0 < value < math.inf, "a number above 0"),
    **dict.fromkeys(_COUNTS, (lambda value: type(value) is int and value >= 0, "a whole number from 0")),
    **dict.fromkeys(_LISTS, (lambda value: isinstance(value, list) and bool(value), "a list of schemas")),
    **dict.fromkeys(_MAPS, (lambda value: isinstance(value, dict), "an object of schemas")),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "required": (
        lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value), "a list of names",
    ),
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    "pattern": (lambda value: isinstance(value, str), "text"),
}  # fmt: skip
"""What the value of a keyword must be: a test, and its description for the error."""


def check_schema(schema: Any) -> None:
    """Raise `DataError` if this is not a schema, or if it has a keyword that cannot be checked."""
    _check(schema, schema, "#")


def violation(value: Any, schema: Any) -> str:
    """Return the first reason why ``value`` does not fit ``schema``, with its path, or "" if it fits."""
    try:
        return next(_violations(value, schema, schema, "the answer"), "")
    except RecursionError:
        return "the answer is nested too deeply"
    except TimeoutError as error:
        return str(error)


def _check(schema: Any, root: Any, where: str) -> None:
    """Check the schema ``where`` in the schema ``root``, and all schemas inside it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise DataError(f"schema {where}: must be an object, true or false, not {json.dumps(schema)[:40]}")
    if unknown := sorted(schema.keys() - _KEYWORDS):
        raise DataError(f"schema {where}: the keyword {unknown[0]!r} cannot be checked; remove or replace it")
    for key, (is_right, description) in _FORMS.items():
        if key in schema and not is_right(schema[key]):
            raise DataError(f"schema {where}: {key} must be {description}, not {_short(schema[key])}")
    types = schema.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in _TYPES:
            raise DataError(f"schema {where}: type {name!r} is unknown; types are {', '.join(_TYPES)}")
    for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", {})]:
        check_pattern(pattern, f"schema {where}: ")
    if "$ref" in schema:
        _resolve(schema["$ref"], root, where)
    for key in _SINGLE:
        if key in schema:
            _check(schema[key], root, f"{where}/{key}")
    for key in (*_LISTS, *_MAPS):
        inner = schema.get(key, {})
        for name, part in inner.items() if isinstance(inner, dict) else enumerate(inner):
            _check(part, root, f"{where}/{key}/{name}")


def _violations(value: Any, schema: Any, root: Any, where: str) -> Iterator[str]:
    """Yield why ``value``, at ``where`` in the answer, does not fit ``schema``, a part of ``root``."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{where} is not allowed"
        return
    if "$ref" in schema:
        yield from _violations(value, _resolve(schema["$ref"], root, where), root, where)
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    if types and not any(_TYPES[name](value) for name in types):
        yield f"{where} is {_short(value)}, not of type {' or '.join(types)}"
    if "const" in schema and not same_json(value, schema["const"]):
        yield f"{where} is {_short(value)}, not {_short(schema['const'])}"
    if "enum" in schema and not any(same_json(value, other) for other in schema["enum"]):
        yield f"{where} is {_short(value)}, which is not in the enum"
    if _is_number(value):
        for key, (holds, problem) in _BOUNDS.items():
            if key in schema and not holds(value, schema[key]):
                yield f"{where} is {_short(value)}, which {problem} {schema[key]}"
    for kind, type_ in _SIZES.items():
        least, most = schema.get(f"min{kind}", 0), schema.get(f"max{kind}", math.inf)
        if isinstance(value, type_) and not least <= len(value) <= most:
            many = "characters" if kind == "Length" else kind.lower()
            limit = f"fewer than {least}" if len(value) < least else f"more than {most}"
            yield f"{where} has {len(value)} {many}, {limit}"
    if isinstance(value, str) and not find(schema.get("pattern", ""), value):
        yield f"{where} is {_short(value)}, which does not match {schema['pattern']}"
    if isinstance(value, list):
        yield from _array_violations(value, schema, root, where)
    if isinstance(value, dict):
        yield from _object_violations(value, schema, root, where)
    yield from _combination_violations(value, schema, root, where)


def _array_violations(value: list[Any], schema: Mapping[str, Any], root: Any, where: str) -> Iterator[str]:
    first = schema.get("prefixItems", [])
    for number, part in enumerate(value):
        rule = first[number] if number < len(first) else schema.get("items", True)
        yield from _violations(part, rule, root, f"{where}[{number}]")
    if schema.get("uniqueItems") and any(
        same_json(part, other) for n, part in enumerate(value) for other in value[:n]
    ):
        yield f"{where} has equal items, which uniqueItems forbids"
    if "contains" in schema and not any(_fits(part, schema["contains"], root) for part in value):
        yield f"{where} has no item that fits contains"


def _object_violations(
    value: dict[str, Any], schema: Mapping[str, Any], root: Any, where: str
) -> Iterator[str]:
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where} has no {name!r}"
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, part in value.items():
        rules = [known[name]] if name in known else []
        rules += [rule for pattern, rule in patterns.items() if find(pattern, name)]
        for rule in rules or [schema.get("additionalProperties", True)]:
            yield from _violations(part, rule, root, f"{where}.{name}")
        yield from _violations(name, schema.get("propertyNames", True), root, f"the name {name!r}")


def _combination_violations(value: Any, schema: Mapping[str, Any], root: Any, where: str) -> Iterator[str]:
    for part in schema.get("allOf", []):
        yield from _violations(value, part, root, where)
    if "anyOf" in schema and not any(_fits(value, part, root) for part in schema["anyOf"]):
        yield f"{where} fits no schema in anyOf"
    if "oneOf" in schema and sum(_fits(value, part, root) for part in schema["oneOf"]) != 1:
        yield f"{where} does not fit exactly one schema in oneOf"
    if "not" in schema and _fits(value, schema["not"], root):
        yield f"{where} fits the schema in not"


def _fits(value: Any, schema: Any, root: Any) -> bool:
    return next(_violations(value, schema, root, ""), None) is None


def _resolve(reference: Any, root: Any, where: str) -> Any:
    """Return the part of the schema that a reference (``#/$defs/NAME``) names."""
    found = root
    try:
        if not reference.startswith("#"):
            raise KeyError
        for part in filter(None, reference[1:].split("/")):
            part = part.replace("~1", "/").replace("~0", "~")
            found = found[int(part)] if isinstance(found, list) else found[part]
    except (AttributeError, KeyError, IndexError, ValueError, TypeError):
        raise DataError(f"schema {where}: {reference!r} names nothing inside the schema") from None
    return found


def same_json(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
