"""Constraints: what may come next, against Python's own re and json; and constraints that cannot be held."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.constraint import Constraint, Guide
from herd.errors import EngineError

ANSWER = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}


def guide(constraint: Constraint, tokenizer, text: str = "") -> Guide:
    guide = Guide(constraint, tokenizer)
    for byte in text.encode():
        assert guide.allowed()[byte], f"{chr(byte)!r} is not allowed"
        guide.push([byte])
    return guide


def accepts(constraint: Constraint, tokenizer, text: str) -> bool:
    """Whether ``text`` is a whole answer: every byte allowed, then the stop token."""
    guide = Guide(constraint, tokenizer)
    for byte in text.encode():
        if not guide.allowed()[byte]:
            return False
        guide.push([byte])
    return bool(guide.allowed()[tokenizer.eos_id])


@pytest.mark.parametrize("pattern", ["a{1,3}b?", "(ab|ac)*", "[0-9]{2}-[0-9]{2}", "(a|aa)(b|ab)", "[^x]y|é+", ""])
@settings(max_examples=60)
@given(st.text("abcxy019-é", max_size=6))
def test_regex_is_pythons(tokenizer, pattern, text):
    assert accepts(Constraint.regex(pattern), tokenizer, text) == bool(re.fullmatch(pattern, text))


def test_schema_accepts_and_refuses(tokenizer):
    schema = Constraint.json_schema(ANSWER)
    assert accepts(schema, tokenizer, '{"name": "Ann", "ages": [1, -20]}')
    assert accepts(schema, tokenizer, '{\n  "name": "\\u001fé \\" ",\n  "ages": []\n}')
    for bad in ('{"name": 1', '{"ages"', '{"name": "x"}', "[", '{"name": "x", "ages": [1.5', '{"name": "a\n'):
        assert not accepts(schema, tokenizer, bad)


def test_blanks_are_bounded(tokenizer):
    here = guide(Constraint.json_schema(ANSWER), tokenizer, "{" + " " * 40)
    assert not any(here.allowed()[byte] for byte in b" \n\t")


def test_specials_are_never_text(tokenizer):
    here = guide(Constraint.json_schema({"type": "string"}), tokenizer, '"<eo')
    assert torch.equal(here.allowed()[256:], torch.tensor([False, False, False]))
    here.push(list(b's>"'))
    assert here.allowed().nonzero().flatten().tolist() == [tokenizer.eos_id]
    assert here.complete


def test_going_back_is_not_having_gone(tokenizer):
    here = guide(Constraint.json_schema(ANSWER), tokenizer, '{"na')
    before = here.allowed()
    here.push(list(b'me":"x", "ages":[1]}'))
    assert here.complete
    here.pop(len(b'me":"x", "ages":[1]}'))
    assert torch.equal(here.allowed(), before)
    assert not here.complete


def test_lark(tokenizer):
    sums = Constraint.lark('start: number ("+" number)*\nnumber: /[0-9]+/')
    assert accepts(sums, tokenizer, "1+22+3")
    assert not accepts(sums, tokenizer, "1++2")


def test_real_vocabulary(real_data):
    """128,256 tokens: the way of a text under its schema, its stop tokens, its specials."""
    from herd.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(real_data("llama3_tokenizer") / "tokenizer.model")
    here = Guide(Constraint.json_schema(ANSWER), tokenizer)
    for id_ in tokenizer.encode('{"name": "Zoë 東京 <|eot_id|>", "ages": [3, 4444]}'):
        assert here.allowed()[id_]
        assert not here.allowed()[tokenizer.n_ranks :].any()
        here.push([id_])
    assert set(here.allowed().nonzero().flatten().tolist()) == tokenizer.stop_ids


DEEP = '{"items":' * 5000 + "{}" + "}" * 5000


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("json_schema", DEEP), "recursion limit"),
        (Constraint.json_schema({"type": "strnig"}), "Invalid type: strnig"),
        (Constraint.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Constraint.json_schema({"not": {}, "x-guidance": {"lenient": True}}), 'Unimplemented keys: ."not"'),
        (Constraint.json_schema({"$ref": "#/nowhere"}), "'/nowhere' does not exist"),
        (Constraint.json_schema({"$ref": "http://example.com/s.json"}), "example.com"),
        (Constraint.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum .5. is greater"),
        (Constraint.json_schema({"allOf": [False]}), "schema is false"),
        (Constraint.json_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "nothing can come next"),
        (Constraint.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (Constraint.json_schema({"enum": [f"value {i}" for i in range(100_000)]}), "too big"),
        (Constraint.regex("(a"), "unclosed group"),
        (Constraint.regex("a(?!b)"), "look-around"),
        (Constraint.regex("(" * 20_000), "the regex cannot be followed"),
        (Constraint.lark("begin: nothing"), "the lark cannot be followed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_held_is_refused(tokenizer, constraint, message):
    with pytest.raises(EngineError, match=message) as raised:
        Guide(constraint, tokenizer)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("schema", [{"const": {1, 2}}, '{"type": ', DEEP, "", "[]", False, "null"])
def test_schema_that_is_none(schema):
    with pytest.raises(EngineError, match=r"is no JSON|is an object or true, not"):
        Constraint.json_schema(schema)


def test_any_json(tokenizer):
    for text in ("[1, {}]", "null", '"x"', "-1.5e3"):
        assert accepts(Constraint.json_schema(True), tokenizer, text)
    assert not accepts(Constraint.json_schema("{}"), tokenizer, "nul")
    assert json.loads(Constraint.json_schema({"const": "é"}).text) == {"const": "é"}
