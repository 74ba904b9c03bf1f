"""Constraints: what may come next, compared with Python's re and json, and constraints that are refused."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine import Engine, Request, Sampling
from herd.engine import constraint as module
from herd.engine.cache import PagedCache
from herd.engine.constraint import REMEMBERED_GUIDES, Constraint, Guide, GuideCache
from herd.errors import ConstraintError, EngineError

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
    """Return whether ``text`` is a whole answer: every byte is allowed, then the stop token."""
    guide = Guide(constraint, tokenizer)
    for byte in text.encode():
        if not guide.allowed()[byte]:
            return False
        guide.push([byte])
    return bool(guide.allowed()[tokenizer.eos_id])


@pytest.mark.parametrize(
    "pattern", ["a{1,3}b?", "(ab|ac)*", "[0-9]{2}-[0-9]{2}", "(a|aa)(b|ab)", "[^x]y|é+", ""]
)
@settings(max_examples=60)
@given(st.text("abcxy019-é", max_size=6))
def test_a_regex_accepts_what_pythons_does(tokenizer, pattern, text):
    assert accepts(Constraint.regex(pattern), tokenizer, text) == bool(re.fullmatch(pattern, text))


def test_a_schema_accepts_valid_and_rejects_invalid_json(tokenizer):
    schema = Constraint.json_schema(ANSWER)
    assert accepts(schema, tokenizer, '{"name": "Ann", "ages": [1, -20]}')
    assert accepts(schema, tokenizer, '{\n  "name": "\\u001fé \\" ",\n  "ages": []\n}')
    for bad in ('{"name": 1', '{"ages"', '{"name": "x"}', "[", '{"name": "x", "ages": [1.5', '{"name": "a\n'):
        assert not accepts(schema, tokenizer, bad)


def test_blanks_between_tokens_are_bounded(tokenizer):
    here = guide(Constraint.json_schema(ANSWER), tokenizer, "{" + " " * 40)
    assert not any(here.allowed()[byte] for byte in b" \n\t")


def test_special_tokens_are_never_part_of_a_string(tokenizer):
    here = guide(Constraint.json_schema({"type": "string"}), tokenizer, '"<eo')
    assert torch.equal(here.allowed()[256:], torch.tensor([False, False, False]))
    here.push(list(b's>"'))
    assert here.allowed().nonzero().flatten().tolist() == [tokenizer.eos_id]
    assert here.complete


def test_popped_tokens_leave_no_trace(tokenizer):
    here = guide(Constraint.json_schema(ANSWER), tokenizer, '{"na')
    before = here.allowed()
    here.push(list(b'me":"x", "ages":[1]}'))
    assert here.complete
    here.pop(len(b'me":"x", "ages":[1]}'))
    assert torch.equal(here.allowed(), before)
    assert not here.complete


def test_a_lark_grammar_is_followed(tokenizer):
    sums = Constraint.lark('start: number ("+" number)*\nnumber: /[0-9]+/')
    assert accepts(sums, tokenizer, "1+22+3")
    assert not accepts(sums, tokenizer, "1++2")


def test_a_text_passes_its_schema_with_the_vocabulary_of_llama_3(real_data):
    """Each token of a valid text is allowed, special tokens are not, and stop tokens end it."""
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
        (Constraint.json_schema({"type": "strnig"}), "Invalid type: strnig"),
        (Constraint.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Constraint.json_schema({"not": {}}), 'Unimplemented keys: ."not"'),
        (Constraint.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum .5. is greater"),
        (Constraint.json_schema({"allOf": [False]}), "schema is false"),
        (
            Constraint.json_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
            "nothing can come next",
        ),
        (Constraint.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (Constraint.regex("(a"), "unclosed group"),
        (Constraint.regex("a(?!b)"), "look-around"),
        (Constraint.regex("(" * 20_000), "the regular expression is malformed or not supported: "),
        (Constraint.lark("begin: nothing"), "the grammar is malformed or not supported: "),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_constraint_that_cannot_be_guaranteed_is_refused_in_one_line(tokenizer, constraint, message):
    with pytest.raises(EngineError, match=message) as raised:
        Guide(constraint, tokenizer)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("schema", [{"const": {1, 2}}, '{"type": ', DEEP, "", "[]", False, "null"])
def test_what_is_not_a_schema_is_refused(schema):
    with pytest.raises(EngineError, match=r"is not valid JSON|is an object or true, not"):
        Constraint.json_schema(schema)


def test_the_empty_schema_accepts_any_json(tokenizer):
    for text in ("[1, {}]", "null", '"x"', "-1.5e3"):
        assert accepts(Constraint.json_schema(True), tokenizer, text)
    assert not accepts(Constraint.json_schema("{}"), tokenizer, "nul")
    assert json.loads(Constraint.json_schema({"const": "é"}).text) == {"const": "é"}


# In the engine
# -------------------------------------------------------------------------------------------------------

LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 4},
        {"enum": ["a", 7, None, [1]]},
        {"const": {"k": "v"}},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
    ]
)


def _deeper(inner):
    arrays = st.builds(
        lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)
    )
    objects = st.dictionaries(st.sampled_from("abc"), inner, max_size=3).flatmap(
        lambda fields: st.sets(st.sampled_from(sorted(fields)) if fields else st.nothing()).map(
            lambda needed: {
                "type": "object",
                "properties": fields,
                "required": sorted(needed),
                "additionalProperties": False,
            }
        )
    )
    return st.one_of(
        arrays, objects, st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})
    )


SCHEMAS = st.recursive(LEAVES, _deeper, max_leaves=5)


def valid(value, schema) -> bool:
    """Return whether a value is valid by the standard, for the keywords above."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == x and type(value) is type(x) for x in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "string":
            fits = isinstance(value, str) and len(value) <= schema.get("maxLength", 99)
            return fits and re.search(schema.get("pattern", ""), value) is not None
        case "array":
            return (
                isinstance(value, list)
                and len(value) <= schema["maxItems"]
                and all(valid(x, schema["items"]) for x in value)
            )
        case _:
            fields = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(fields)
                and all(valid(x, fields[key]) for key, x in value.items())
            )


@settings(max_examples=40)
@given(
    st.lists(SCHEMAS, min_size=1, max_size=4),
    st.sampled_from([0, 1.0, 3.0]),
    st.sampled_from([None, "ngram"]),
)
def test_a_random_model_writes_valid_json(model, tokenizer, schemas, temperature, draft):
    """Answers of one batch with random schemas are valid, or the beginning of a valid one."""
    sampling = Sampling(max_tokens=120, temperature=temperature, seed=1)
    requests = [Request([1, 2, 3], sampling, constraint=Constraint.json_schema(s)) for s in schemas]
    plain = Request([4, 5], Sampling(max_tokens=30))
    *answers, free = Engine(model, tokenizer, draft=draft).run([*requests, plain])
    assert free.ids == Engine(model, tokenizer).run([plain])[0].ids
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.finish_reason == "stop":
            assert valid(json.loads(answer.text), schema)
        else:
            assert answer.finish_reason == "length"
            assert len(answer.ids) == 120


REQUESTS = [
    Request([i], Sampling(max_tokens=50, temperature=t, seed=i), constraint=c)
    for i, (t, c) in enumerate(
        [
            (0, Constraint.regex("[0-9]{3}-[0-9]{4}")),
            (1.5, Constraint.regex("(yes|no|perhaps)( [a-z]+){1,3}\\.")),
            (0, Constraint.json_schema(ANSWER)),
            (1, Constraint.lark('start: "x" ("y" | "z")+')),
            (1, None),
        ]
    )
]


def outcomes(completions):
    return [(c.ids, c.text, c.finish_reason, c.stop_id) for c in completions]


def test_constrained_answers_do_not_depend_on_batch_or_preemption(model, tokenizer):
    """Neither the batch nor having to begin again changes a constrained answer."""
    want = [Engine(model, tokenizer).run([r])[0] for r in REQUESTS]
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", want[0].text)
    assert want[0].finish_reason == "stop"
    assert outcomes(Engine(model, tokenizer).run(REQUESTS)) == outcomes(want)
    longer = [
        replace(r, prompt_ids=[*range(60)], sampling=replace(r.sampling, max_tokens=90)) for r in REQUESTS
    ]
    tight = Engine(model, tokenizer, cache_bytes=8 * PagedCache(model.config, "fp32", 0).page_bytes)
    assert outcomes(tight.run(longer)) == outcomes([Engine(model, tokenizer).run([r])[0] for r in longer])
    assert tight.n_preempted > 0


def test_the_pieces_of_a_constrained_stream_add_up_to_the_answer(model, tokenizer):
    stream = Engine(model, tokenizer).submit(REQUESTS[1])
    assert "".join(d.text for d in stream) == Engine(model, tokenizer).run([REQUESTS[1]])[0].text


def test_stop_strings_and_stop_tokens_end_a_constrained_answer(model, tokenizer):
    abc = Constraint.regex("abc")
    by_text = Request([3], Sampling(stop=("bc",)), constraint=abc)
    by_token = Request([3], Sampling(), frozenset({ord("b")}), abc)
    one, other, whole = Engine(model, tokenizer).run([by_text, by_token, Request([3], constraint=abc)])
    assert (one.text, one.stop_id, one.finish_reason) == ("a", None, "stop")
    assert (other.text, other.stop_id, other.finish_reason) == ("a", ord("b"), "stop")
    assert (whole.text, whole.stop_id, whole.finish_reason) == ("abc", None, "stop")


def test_bad_constraints_are_refused_when_submitted(model, tokenizer):
    engine = Engine(model, tokenizer)
    bad = Request([1], constraint=Constraint.regex("(a"))
    with pytest.raises(EngineError, match="unclosed group"):
        engine.submit(bad)
    with pytest.raises(EngineError, match="unclosed group"):
        engine.run([Request([1]), bad])
    assert engine.n_waiting == 0
    with pytest.raises(EngineError, match="a constraint needs a tokenizer"):
        Engine(model, None).submit(Request([1], constraint=Constraint.regex("a")))


def test_a_guide_that_failed_is_not_complete(tokenizer):
    constraint_guide = guide(Constraint.regex("ab"), tokenizer, "a")
    with pytest.raises(EngineError, match="the regular expression cannot be followed"):
        constraint_guide.push([ord("x")])
    assert constraint_guide.failed
    assert not constraint_guide.complete


def test_a_constraint_that_fails_costs_its_own_request_only(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer)
    good, bad = (
        engine.submit(Request([i], Sampling(max_tokens=20), constraint=c))
        for i, c in ((1, None), (2, REQUESTS[2].constraint))
    )
    next(bad)
    monkeypatch.setattr(Guide, "allowed", lambda self: (_ for _ in ()).throw(EngineError("too complex")))
    with pytest.raises(EngineError, match="too complex"):
        bad.completion()
    assert (
        good.completion().ids == Engine(model, tokenizer).run([Request([1], Sampling(max_tokens=20))])[0].ids
    )
    assert engine.n_active == engine.cache.pages.n_used == 0


def test_a_constraint_is_compiled_once_for_all_its_answers(tokenizer, monkeypatch):
    """Eight threads want it at the same time. Copies do not see each other's tokens, and errors are not kept."""
    cache, made = GuideCache(tokenizer), []
    real = Guide.__init__
    monkeypatch.setattr(
        Guide,
        "__init__",
        lambda self, constraint, *how: (made.append(constraint), real(self, constraint, *how))[1],
    )
    constraint = Constraint.json_schema(ANSWER)
    with ThreadPoolExecutor(8) as pool:
        guides = list(pool.map(cache.guide, [constraint] * 8))
    assert made == [constraint]
    first = guides[0].allowed()
    guides[1].push(list(b"{"))
    assert first.equal(guides[0].allowed())
    assert not first.equal(guides[1].allowed())
    assert first.equal(cache.guide(constraint).allowed())
    for _ in range(2):
        with pytest.raises(ConstraintError, match="malformed"):
            cache.guide(Constraint.regex("("))
    assert len(made) == 3
    for i in range(REMEMBERED_GUIDES):
        cache.guide(Constraint.json_schema({"const": i}))
    cache.guide(constraint)
    assert made.count(constraint) == 2


def test_a_constraint_that_takes_too_long_for_a_token_fails_alone(model, tokenizer, monkeypatch):
    """The limit is set to zero once the answer has begun."""
    engine = Engine(model, tokenizer)
    good, bad = engine.submit(Request([1], Sampling(max_tokens=9))), engine.submit(REQUESTS[2])
    next(bad)
    monkeypatch.setattr(module, "MASK_SECONDS", 0.0)
    with pytest.raises(ConstraintError, match="for one token, the limit is"):
        bad.completion()
    assert len(good.completion().ids) == 9
