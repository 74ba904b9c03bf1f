"""JSON schemas: numbers are kept exactly or refused, and no schema stops or stalls the process."""

import json
import math
import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd.engine import constraint as constraints
from herd.engine.constraint import Constraint, Guide
from herd.engine.schema import LARGEST_INTEGER, canonical_schema
from herd.errors import EngineError

SNOWFLAKE = {"const": 1234567890123456789}
BELOW_INT64 = {"type": "integer", "minimum": -9223372036854775817, "maximum": -9223372036854775809}


def guide_of(schema, tokenizer) -> Guide | None:
    """The guide of a schema, or None where the schema is refused."""
    try:
        return Guide(Constraint.json_schema(schema), tokenizer)
    except EngineError:
        return None


def accepts(guide: Guide, tokenizer, text: str) -> bool:
    """Whether ``text`` is a whole answer. The guide is put back to where it was."""
    pushed = 0
    try:
        for byte in text.encode():
            if not guide.allowed()[byte]:
                return False
            guide.push([byte])
            pushed += 1
        return bool(guide.allowed()[tokenizer.eos_id])
    finally:
        guide.pop(pushed)


def is_valid_number(text: str, schema: dict) -> bool:
    """By the standard, in exact decimal arithmetic, for the keywords of numbers, ``const`` and ``enum``."""
    value = Decimal(text)
    limit = {key: Decimal(repr(x)) for key, x in schema.items() if isinstance(x, int | float)}
    return (
        limit.get("const", value) == value
        and ("enum" not in schema or any(value == Decimal(repr(x)) for x in schema["enum"]))
        and limit.get("minimum", value) <= value <= limit.get("maximum", value)
        and not value <= limit.get("exclusiveMinimum", value - 1)
        and not value >= limit.get("exclusiveMaximum", value + 1)
        and ("multipleOf" not in schema or value % limit["multipleOf"] == 0)
        and (schema.get("type") != "integer" or value == value.to_integral_value())
    )


EDGES = [0, 2**31, 2**53, 2**63, 2**64, 10**15, 10**18, 10**30]
INTEGERS = st.builds(
    lambda edge, sign, offset: sign * edge + offset,
    st.sampled_from(EDGES),
    st.sampled_from([1, -1]),
    st.integers(-12, 12),
) | st.integers(-1000, 1000)
FLOATS = st.builds(
    lambda digits, places: digits / 10**places, st.integers(-(10**7), 10**7), st.integers(0, 7)
)
MULTIPLES = st.sampled_from([1, 2, 7, 100, 997, 999, 1001, 1000003, 2**32 - 1, 2**53, 0.5, 0.01, 0.07, 0.3])
BOUND_NAMES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def numbers(values, type_):
    """Schemas of one number: a constant, a choice, or bounds with or without a step."""
    bounds = st.dictionaries(st.sampled_from(BOUND_NAMES), values, max_size=3)
    ranges = st.builds(
        lambda b, m: {"type": type_} | b | m, bounds, st.just({}) | MULTIPLES.map(lambda m: {"multipleOf": m})
    )
    choices = st.lists(values, min_size=1, max_size=3).map(lambda some: {"enum": some})
    return st.one_of(values.map(lambda x: {"const": x}), choices, ranges)


def spellings_near(schema: dict) -> set[str]:
    """Numbers at the schema's constants and bounds, as a model might write them."""
    named = [x for value in schema.values() for x in (value if isinstance(value, list) else [value])]
    around = [0, 1, -1, 2, *(Decimal(s) for s in ("0.5", "-0.1", "0.001", "-1e-9", "1e-14"))]
    texts = {"-0"}
    for x in named:
        if isinstance(x, int | float):
            exact = Decimal(repr(x))
            for start in (exact, exact.to_integral_value("ROUND_FLOOR"), Decimal(int(float(x)))):
                texts |= {format(start + step, "f") for step in around}
    return {t.rstrip("0").rstrip(".") if "." in t else t for t in texts}


@settings(max_examples=300)
@given(numbers(INTEGERS, "integer") | numbers(INTEGERS | FLOATS, "number"))
@example(SNOWFLAKE)
@example(BELOW_INT64)
@example({"type": "integer", "multipleOf": 1000003})
@example({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5})
@example({"type": "number", "minimum": -1.9, "exclusiveMaximum": -1})
def test_a_number_that_is_accepted_is_valid_and_constants_are_accepted(tokenizer, schema):
    guide = guide_of(schema, tokenizer)
    if guide is None:
        return
    for text in spellings_near(schema):
        if accepts(guide, tokenizer, text):
            assert is_valid_number(text, schema), text
        elif text != "-0" and (schema.get("type") == "integer" or "const" in schema or "enum" in schema):
            assert not is_valid_number(text, schema), f"{text} is valid and not accepted"


WRAPPERS = {
    "%s": lambda s: s,
    '{"a": %s}': lambda s: {
        "type": "object",
        "properties": {"a": s},
        "required": ["a"],
        "additionalProperties": False,
    },
    "[%s]": lambda s: {"type": "array", "prefixItems": [s], "minItems": 1, "maxItems": 1},
    " %s": lambda s: {"anyOf": [{"type": "null"}, s]},
    "\t%s": lambda s: {"$defs": {"n": s}, "$ref": "#/$defs/n"},
    "\n%s": lambda s: {"allOf": [s, {"type": "number", "minimum": -(2**53) + 1}]},
}


@settings(max_examples=60)
@given(numbers(INTEGERS, "integer") | numbers(INTEGERS | FLOATS, "number"))
def test_a_nested_number_is_as_right_as_one_at_the_top(tokenizer, schema):
    top = guide_of(schema, tokenizer)
    for text, wrap in WRAPPERS.items():
        guide = guide_of(wrap(schema), tokenizer)
        if guide is None:
            assert top is None or text == "\n%s"  # an intersection may be empty
            continue
        for number in spellings_near(schema):
            accepted = accepts(guide, tokenizer, (text % number).strip())
            assert not accepted or is_valid_number(number, schema), (text, number)
            if top is not None and text != "\n%s":
                assert accepted == accepts(top, tokenizer, number)


@pytest.mark.parametrize("number", [2**53 - 1, 1 - 2**53, 0, -1, 10**15, 0.1, -2.5, 123456.789])
def test_exact_constants_are_accepted_alone_and_in_a_choice(tokenizer, number):
    text = format(Decimal(repr(number)), "f")
    for schema in (
        {"const": number},
        {"enum": ["x", number]},
        {"type": "number", "minimum": number, "maximum": number},
    ):
        guide = guide_of(schema, tokenizer)
        assert accepts(guide, tokenizer, text)
        assert not accepts(guide, tokenizer, text + "0")
        assert not accepts(guide, tokenizer, "7" + text)


@pytest.mark.parametrize(
    "number",
    [2**53, -(2**53), 2**53 + 1, 1234567890123456789, 2**63 - 1, -(2**63), 2**63, 2**64, -(10**30), 1e300, 1e-20],
)  # fmt: skip
@pytest.mark.parametrize(
    "place", ["const", "enum", "nested const", *BOUND_NAMES, "both", "in $defs", "in anyOf", "in items"]
)
def test_a_number_that_floats_cannot_hold_is_refused_by_name(tokenizer, number, place):
    schema = {
        "const": {"const": number},
        "enum": {"enum": [1, number]},
        "nested const": {"const": {"a": [number]}},
        "both": {"type": "integer", "minimum": number, "maximum": number},
        "in $defs": {"$defs": {"id": {"const": number}}, "$ref": "#/$defs/id"},
        "in anyOf": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": number}]},
        "in items": {"type": "array", "items": {"type": "object", "properties": {"id": {"const": number}}}},
    }.get(place, {"type": "integer", place: number})
    with pytest.raises(EngineError, match="cannot be kept exactly") as raised:
        Guide(Constraint.json_schema(schema), tokenizer)
    assert str(Decimal(repr(number)))[:10] in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"const": 0.1000000000000000055}', '"const": 0.1000000000000000055'),
        ('{"const": 1e999999999999}', '"const": 1E\\+999999999999'),
        ('{"const": 1e99999999999999999999}', "1e9+ is too large or too small for a number"),
        ('{"const": -1e-99999999999999999999}', "is too large or too small for a number"),
        ('{"const": NaN}', "NaN is not a number"),
        ('{"minimum": -Infinity}', "-Infinity is not a number"),
        ('{"const": ' + "9" * 5000 + "}", r"999… \(5000 characters\) cannot be kept exactly"),
        ('{"items": [1e999999999]}', "cannot be kept exactly"),
        ('{"type": "integer", "multipleOf": 1000003}', "1000003 is too large"),
        ('{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}', "too large"),
        ('{"multipleOf": 0}', "must be above 0"),
        ('{"multipleOf": -2}', "must be above 0"),
        ('{"type": "object", "x-guidance": {"item_separator": ";"}}', "x-guidance"),
        ('{"$ref": "#/default", "default": {"const": 1152921504606846977}}', "#/default.* does not exist"),
        ('{"$ref": "#/const/a", "const": {"a": {"type": "null"}}}', "does not exist"),
        ('{"$ref": "#there", "$defs": {"a": {"$anchor": "there"}}}', "does not exist"),
        ('{"$ref": "#/nowhere"}', "#/nowhere.* does not exist"),
        ('{"$ref": "http://example.com/s.json"}', "example.com.* does not exist"),
        ('{"$ref": 5}', "does not exist"),
        ('{"properties": {"a": {"$id": "http://example.com/"}}}', "below the top"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"items":' * 100 + "{}" + "}" * 100, "nested more than 60 levels"),
        ('{"const":' + "[" * 100 + "]" * 100 + "}", "nested more than 60 levels"),
        ('{"const": "' + "x" * 600_000 + '"}', "600,013 characters, and the limit is 500,000"),
    ],
    ids=range(24),
)
def test_what_the_library_would_get_wrong_is_refused_in_one_line(text, message):
    with pytest.raises(EngineError, match=message) as raised:
        Constraint.json_schema(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_names_of_keywords_are_ordinary_names_of_properties(tokenizer):
    schema = {
        "type": "object",
        "properties": {"minimum": {"const": "a"}, "const": {"type": "integer", "exclusiveMinimum": 4}},
        "required": ["minimum", "const"],
        "additionalProperties": False,
        "default": {"minimum": 2**70},
        "title": "ignored",
    }
    guide = guide_of(schema, tokenizer)
    assert accepts(guide, tokenizer, '{"minimum": "a", "const": 5}')
    assert not accepts(guide, tokenizer, '{"minimum": "a", "const": 4}')


def test_references_with_escapes_lead_to_their_schemas(tokenizer):
    schema = {"$defs": {"a/b ~": {"type": "integer", "exclusiveMaximum": 3}}, "$ref": "#/$defs/a~1b%20~0"}
    guide = guide_of(schema, tokenizer)
    assert accepts(guide, tokenizer, "2")
    assert not accepts(guide, tokenizer, "3")


def test_exclusive_bounds_of_draft_4_are_understood(tokenizer):
    guide = guide_of(
        {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "exclusiveMaximum": False}, tokenizer
    )
    assert accepts(guide, tokenizer, "2")
    assert not accepts(guide, tokenizer, "1")


def test_canonical_schemas_stay_as_they_are():
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": LARGEST_INTEGER}},
        "additionalProperties": False,
    }
    once = canonical_schema(json.dumps(schema))
    assert json.loads(once) == schema
    assert canonical_schema(once) == once


def chain(n: int, link) -> dict:
    """A schema of ``n`` definitions, each of which refers to the next."""
    definitions = {f"a{i}": link(f"#/$defs/a{i + 1}") for i in range(n)}
    return {"$defs": {**definitions, f"a{n}": {"type": "null"}}, "$ref": "#/$defs/a0"}


@pytest.mark.parametrize(
    "schema",
    [
        chain(5000, lambda ref: {"$ref": ref}),
        chain(4000, lambda ref: {"allOf": [{"$ref": ref}, {}]}),
        chain(3000, lambda ref: {"properties": {"x": {"$ref": ref}}}),
    ],
    ids=["references", "intersections", "objects"],
)
def test_a_schema_that_crashes_the_library_is_refused(tokenizer, schema):
    with pytest.raises(EngineError, match="too complex: compiling it takes more than"):
        Guide(Constraint.json_schema(schema), tokenizer)


def test_a_grammar_that_crashes_the_library_is_refused(tokenizer):
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(20_000))
    with pytest.raises(EngineError, match="grammar is too complex"):
        Guide(Constraint.lark(f'start: r0\n{rules}\nr20000: "a"'), tokenizer)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
        {"type": "array", "minItems": 10**6},
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "pattern": ".*a.{2000}"},
        {"type": "string", "pattern": "(((a?){1000}){1000}){1000}"},
        {"type": "string", "pattern": "(" * 20_000},
        {"type": "object", "minProperties": 10**6},
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(8)]},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        {"type": "object", "required": [f"a{i}" for i in range(2000)]},
        chain(60, lambda ref: {"allOf": [{"$ref": ref}, {"$ref": ref}]}),
    ],
    ids=range(11),
)
def test_a_hostile_schema_is_compiled_or_refused_in_bounded_time(tokenizer, schema):
    guide_of(schema, tokenizer)


@pytest.fixture
def children(monkeypatch):
    """The number of child processes started, in a list, with no verdict remembered."""
    monkeypatch.setattr(constraints, "_verdicts", {})
    started: list[int] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: started.append(1) or run(*args, **kw))
    return started


def test_an_ordinary_schema_needs_no_child_process(tokenizer, children):
    properties = {
        f"field_{i}": {"type": "integer", "minimum": -i, "description": "x" * 100} for i in range(40)
    }
    assert guide_of({"type": "object", "properties": properties}, tokenizer)
    assert not children


def test_a_pattern_is_compiled_in_one_child_process_and_its_verdict_remembered(tokenizer, children):
    for _ in range(3):
        assert guide_of({"type": "string", "pattern": "^[a-z]+$"}, tokenizer)
    assert len(children) == 1


def test_a_child_process_that_cannot_start_is_not_remembered_as_a_verdict(tokenizer, children, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(EngineError, match=r"the process that compiles a constraint failed.*try again"):
            Guide(Constraint.regex("a+"), tokenizer)
    assert Guide(Constraint.regex("a+"), tokenizer)


def test_steps_multiply_only_within_the_librarys_arithmetic(tokenizer):
    guide = guide_of({"allOf": [{"type": "integer", "multipleOf": 55}, {"multipleOf": 85}]}, tokenizer)
    assert accepts(guide, tokenizer, str(3 * math.lcm(55, 85)))
    assert not accepts(guide, tokenizer, str(55 * 84))


def test_an_object_gets_only_the_properties_it_lists():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert json.loads(canonical_schema(json.dumps(schema)))["additionalProperties"] is False
    for more in (
        {"additionalProperties": True},
        {"patternProperties": {"^b": {}}},
        {"required": ["a", "b"]},
        {"anyOf": [{"required": ["b"]}]},
        {"allOf": [{"properties": {"b": {}}}]},
    ):
        assert (
            json.loads(canonical_schema(json.dumps(schema | more))).get("additionalProperties") is not False
        )
