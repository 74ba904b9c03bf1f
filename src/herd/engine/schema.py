"""Rewrite a JSON schema so that llguidance reads every number in it exactly, or refuse it.

llguidance stores numbers as 64-bit floats, computes integer ranges in 64-bit integers, and multiplies the
``multipleOf`` of merged schemas in 32-bit integers. Outside these ranges it changes constants, accepts wrong
answers, or overflows its stack and kills the process. So only numbers that all three represent exactly are
accepted.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeGuard
from urllib.parse import unquote

from ..errors import ConstraintError

LARGEST_INTEGER = 2**53 - 1
"""Integers up to this one, and their neighbours, are exact as 64-bit floats."""
MAX_DIGITS = 15
"""Decimals of this many significant digits survive the conversion to a 64-bit float and back."""
LARGEST_MULTIPLE = 1_000
"""Largest ``multipleOf``. llguidance's automaton has a state for each remainder and each digit of a bound, so
that from about 5,000 on a long answer exceeds its limit on states. The product of two multiples must also
stay below 2^32."""
MAX_LEVELS = 60
"""Levels of nesting that llguidance's recursion survives even on a thread with a small stack."""

ANNOTATIONS = {"title", "description", "default", "examples", "$comment", "readOnly", "writeOnly"}
SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
MORE_PROPERTIES = {
    "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties",
    "$ref", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependentRequired",
}  # fmt: skip
"""Keywords that describe properties beyond those listed."""
BOUNDS = (("minimum", "exclusiveMinimum", 1, max), ("maximum", "exclusiveMaximum", -1, min))

Numeric = int | Decimal


def canonical_schema(text: str) -> str:
    """Return a schema whose numbers llguidance reads exactly and which accepts nothing that ``text`` refuses.

    Annotations are dropped. An object that lists its properties and does not mention others gets no others:
    small models would otherwise invent properties without end. Raises ConstraintError, naming the keyword and
    its value, for numbers that cannot be kept, and for references that do not lead to a schema of this
    document.
    """
    try:
        schema = json.loads(
            text, parse_float=_exact_number, parse_int=_exact_number, parse_constant=_refuse_constant
        )
    except (ValueError, ArithmeticError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ConstraintError(f"the JSON schema is not valid JSON: {problem}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ConstraintError(f"a JSON schema is an object or true, not {' '.join(text.split())[:60]}")
    return json.dumps(_Canonical(closes_objects='"allOf"' not in text).document(schema), default=float)


class _Canonical:
    """A walk over a schema, and what it collects for the checks at its end: references and multiples."""

    def __init__(self, *, closes_objects: bool) -> None:
        self._closes_objects = closes_objects  # not where a part of an object is described elsewhere
        self._pointers: set[str] = set()  # of all schemas in the document, as JSON pointers
        self._references: list[Any] = []
        self._multiples: list[Numeric] = []

    def document(self, schema: dict[str, Any]) -> Any:
        if "x-guidance" in schema:
            raise _refusal("x-guidance", "…", "would change the grammar: remove it")
        schema = self._schema(
            {key: value for key, value in schema.items() if key not in ("$id", "id")}, "#", 0
        )
        for reference in self._references:
            if unquote(str(reference)) not in self._pointers:
                cure = "lead to another schema of the same document, as #/$defs/NAME does"
                raise _refusal("$ref", reference, f"does not exist: a reference must {cure}")
        n_decimals = max((-int(Decimal(x).as_tuple().exponent) for x in self._multiples), default=0)
        if (
            math.lcm(*(int(Fraction(x) * 10 ** max(n_decimals, 0)) for x in self._multiples))
            > LARGEST_MULTIPLE
        ):
            limit = (
                f"their least common multiple, in units of the last digit, must be at most {LARGEST_MULTIPLE}"
            )
            raise _refusal("multipleOf", max(self._multiples), f"is too large, alone or with others: {limit}")
        return schema

    def _schema(self, node: Any, pointer: str, level: int) -> Any:
        """Return the canonical form of one schema. llguidance judges values that are not objects."""
        _check_level(level)
        if _is_number(node):
            _check_number(node, pointer)
        if not isinstance(node, dict):
            return node
        self._pointers.add(pointer)
        if level and "$id" in node:
            raise _refusal("$id", node["$id"], 'is below the top of the schema: use "$defs" instead')
        schema = {
            key: self._keyword(key, value, f"{pointer}/{_escaped(key)}", level + 1)
            for key, value in node.items()
            if key not in ANNOTATIONS
        }
        _rewrite_exclusive_bounds(schema)
        if self._closes_objects and _lists_its_properties(schema):
            schema["additionalProperties"] = False
        return schema

    def _keyword(self, key: str, value: Any, pointer: str, level: int) -> Any:
        if key in ("const", "enum"):
            _check_data(value, key, level)
        elif key == "$ref":
            self._references.append(value)
        elif _is_number(value):
            _check_number(value, key)
            if key == "multipleOf":
                if value <= 0:
                    raise _refusal(key, value, "must be above 0")
                self._multiples.append(value)
        elif isinstance(value, list):
            return [self._schema(x, f"{pointer}/{i}", level) for i, x in enumerate(value)]
        elif isinstance(value, dict) and key in SCHEMAS_BY_NAME:
            return {name: self._schema(x, f"{pointer}/{_escaped(name)}", level) for name, x in value.items()}
        elif isinstance(value, dict):
            return self._schema(value, pointer, level)
        return value


def _lists_its_properties(schema: dict[str, Any]) -> bool:
    """Return whether an object's schema names all properties it needs, and has no keyword about others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    named = isinstance(properties, dict) and isinstance(required, list) and set(required) <= properties.keys()
    return named and not schema.keys() & MORE_PROPERTIES


def _rewrite_exclusive_bounds(schema: dict[str, Any]) -> None:
    """Replace exclusive bounds that point away from zero by inclusive ones, a step of the last digit away.

    llguidance gets these bounds wrong: it accepts 1 for ``{"exclusiveMinimum": 1, "maximum": 1.5}``.
    """
    for plain, exclusive, sign, stricter in BOUNDS:
        bound: Any = schema.get(exclusive)
        if isinstance(bound, bool):  # draft 4: whether "minimum" itself is exclusive
            del schema[exclusive]
            if bound and plain in schema:
                schema[exclusive] = bound = schema.pop(plain)
        if not _is_number(bound) or sign * bound < 0:
            continue
        del schema[exclusive]
        step = Decimal(10) ** min(0, max(Decimal(bound).adjusted(), 0) - MAX_DIGITS + 1)
        inclusive = _exact_number(str(bound + sign * step))
        old: Any = schema.get(plain)
        schema[plain] = stricter(old, inclusive) if _is_number(old) else inclusive


def _check_data(value: Any, key: str, level: int) -> None:
    _check_level(level)
    if _is_number(value):
        _check_number(value, key)
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_data(inner, key, level + 1)


def _check_level(level: int) -> None:
    if level > MAX_LEVELS:
        raise ConstraintError(f"the JSON schema is nested more than {MAX_LEVELS} levels deep")


def _check_number(value: Numeric, key: str) -> None:
    if not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        cure = "the limit is 2^53 - 1; make it a string, or leave it out"
        raise _refusal(key, value, f"cannot be kept exactly: {cure}")
    if isinstance(value, Decimal):
        _, digits, exponent = value.as_tuple()
        if len(digits) > MAX_DIGITS or int(exponent) < -MAX_DIGITS:
            raise _refusal(key, value, f"cannot be kept exactly: round it to {MAX_DIGITS} digits")


def _refusal(key: str, value: Any, problem: str) -> ConstraintError:
    text = str(value)
    short = text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"
    return ConstraintError(f'the JSON schema\'s "{key}": {short} {problem}')


def _exact_number(text: str) -> Numeric:
    try:
        value = Decimal(text)
    except ArithmeticError:
        raise ValueError(f"{text[:40]} is too large or too small for a number") from None
    return int(value) if value.adjusted() < 20 and value == value.to_integral_value() else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _is_number(value: Any) -> TypeGuard[Numeric]:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
