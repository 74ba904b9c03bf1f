"""The grammars of calls: what they accept is what the parser of answers reads as these calls."""

import pytest

from herd.engine.constraint import Guide
from herd.errors import EngineError
from herd.serve.errors import ApiError
from herd.serve.forms import AnswerForm, answer_form, response_schema
from herd.serve.tools import OfferedTool, ToolChoice
from herd.text.answers import AnswerParser

REFERENCE = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/number"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
TOOLS = (OfferedTool("f", "", REFERENCE, strict=True), OfferedTool("g"))
CALLS = {
    "json": ('{{"type": "function", "name": "{0}", "parameters": {1}}}', "; ", "", ""),
    "hermes": ('<tool_call>\n{{"name": "{0}", "arguments": {1}}}\n</tool_call>', "\n", "", ""),
    "mistral": ('{{"name": "{0}", "arguments": {1}}}', ", ", "[TOOL_CALLS][", "]"),
}


def written(form, *calls):
    call, between, opening, closing = CALLS[form]
    return opening + between.join(call.format(*each) for each in calls) + closing


def accepts(tokenizer, form, text):
    """Return whether the whole text is an answer that a constraint allows."""
    guide = Guide(form.constraint, tokenizer)
    try:
        guide.push(tokenizer.encode(text))
    except EngineError:
        return False
    return guide.complete or bool(guide.allowed()[sorted(tokenizer.stop_ids)].any())


def form_of(tokenizer, name, choice, parallel=True, schema=None):
    return answer_form(tokenizer, name, TOOLS, choice, parallel, schema, [])


@pytest.mark.parametrize("name", CALLS)
def test_required_calls(tokenizer, name):
    form = form_of(tokenizer, name, ToolChoice("required"))
    good = ("f", '{"x": 1}'), ("g", '{"any": [1, "a"]}')
    for calls in (good[:1], good[1:], good, (*good, *good)):
        text = written(name, *calls)
        assert accepts(tokenizer, form, text), text
        parsed = AnswerParser(tools=True).parse(text)
        assert [call.name for call in parsed.calls] == [each[0] for each in calls]
        assert (parsed.content, parsed.errors) == ("", [])
    for calls in ((("f", '{"x": "1"}'),), (("f", "{}"),), (("f", '{"x": 1, "y": 2}'),), (("h", "{}"),)):
        assert not accepts(tokenizer, form, written(name, *calls))
    assert not accepts(tokenizer, form, "No.")


@pytest.mark.parametrize("name", CALLS)
def test_a_named_tool_and_no_parallel_calls(tokenizer, name):
    named = form_of(tokenizer, name, ToolChoice("required", ("g",)))
    assert accepts(tokenizer, named, written(name, ("g", "{}")))
    assert not accepts(tokenizer, named, written(name, ("f", '{"x": 1}')))
    single = form_of(tokenizer, name, ToolChoice("required"), parallel=False)
    assert accepts(tokenizer, single, written(name, ("g", "{}")))
    assert not accepts(tokenizer, single, written(name, ("g", "{}"), ("g", "{}")))


@pytest.mark.parametrize("name", CALLS)
def test_a_strict_tool_that_need_not_be_called(tokenizer, name):
    form = form_of(tokenizer, name, ToolChoice())
    assert form.calls_first
    assert accepts(tokenizer, form, written(name, ("f", '{"x": 1}')))
    assert not accepts(tokenizer, form, written(name, ("f", '{"x": "1"}')))
    assert accepts(tokenizer, form, "No, { is a brace.\nAnd <b> [too].")


def test_a_schema_of_the_text_beside_tools(tokenizer):
    form = form_of(
        tokenizer, "json", ToolChoice(), schema={"type": "object", "properties": {"ok": {"type": "null"}}}
    )
    assert accepts(tokenizer, form, '{"ok": null}')
    assert accepts(tokenizer, form, written("json", ("g", "{}")))
    assert not accepts(tokenizer, form, "ok")


def test_control_tokens_of_a_format_are_the_vocabularys_own():
    class WithControlTokens:
        special_tokens = {"<tool_call>": 7, "</tool_call>": 8, "[TOOL_CALLS]": 9}  # noqa: RUF012

    tools, choice = (OfferedTool("g"),), ToolChoice("required")
    hermes = answer_form(WithControlTokens(), "hermes", tools, choice, False, None, []).constraint.text
    assert "<[7]>" in hermes
    assert "<[8]>" in hermes
    mistral = answer_form(WithControlTokens(), "mistral", tools, choice, False, None, []).constraint.text
    assert "<[9]>" in mistral


def test_free_tools_are_not_constrained(tokenizer):
    free = (OfferedTool("g"),)
    assert answer_form(tokenizer, "json", free, ToolChoice(), True, None, []) == AnswerForm(has_calls=True)
    assert answer_form(tokenizer, "json", free, ToolChoice("none"), True, None, []) == AnswerForm()


@pytest.mark.parametrize("schema", [{"const": 59083451981974500}, {"$ref": "#/nowhere"}, {"x-guidance": {}}])
def test_schemas_that_herd_itself_refuses(schema):
    warnings: list[str] = []
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert response_schema(form, warnings) == {"type": "object"}
    assert "not enforced" in warnings[0]
    form["json_schema"]["strict"] = True
    with pytest.raises(ApiError, match="cannot be enforced") as error:
        response_schema(form, [])
    assert error.value.status == 400


def test_response_formats():
    warnings: list[str] = []
    assert response_schema(None, warnings) is None
    assert response_schema({"type": "text"}, warnings) is None
    assert response_schema({"type": "json_object"}, warnings) == {"type": "object"}
    hard = {"type": "string", "format": "no-such-format"}
    lax = {"type": "json_schema", "json_schema": {"name": "a", "schema": hard}}
    assert response_schema(lax, warnings) == {"type": "object"}
    assert warnings[0].startswith("response_format.json_schema.schema=not enforced")
    lax["json_schema"]["strict"] = True
    with pytest.raises(ApiError, match="cannot be enforced"):
        response_schema(lax, [])
