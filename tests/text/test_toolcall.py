"""The parser of tool calls: streamed equals whole for every cut, nothing raises, and examples of each form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_strategies import FRAGMENTS

from herd.text import Content, Malformed, Parsed, ToolCall, ToolCallParser, parse

F1 = ToolCall("f", {"a": 1}, "json")


def gather(pieces: list[str], names=None) -> Parsed:
    parser, parsed = ToolCallParser(names), Parsed()
    for piece in pieces:
        for event in parser.feed(piece):
            parsed.add(event)
    for event in parser.finish():
        parsed.add(event)
    return parsed


def test_streaming_equals_parsing_the_whole_text_at_every_cut():
    for text in ("".join(FRAGMENTS[:13]), "\n".join(FRAGMENTS[:20]), "; ".join(FRAGMENTS[13:])):
        whole = parse(text)
        assert whole.calls
        for cut in range(len(text) + 1):
            assert gather([text[:cut], text[cut:]]) == whole


@given(text=st.text())
def test_arbitrary_text_never_raises(text):
    for prefix in ("", "<|python_tag|>", '{"name": "f", "parameters": ', "<function=f>", "f.call(a="):
        parse(prefix + text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}\"'\\", max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    arguments=st.dictionaries(st.sampled_from(["a", "b", "query"]), json_values, max_size=3),
    tool_call_format=st.sampled_from(["json", "builtin", "function"]),
    tag=st.booleans(),
    ascii_=st.booleans(),
    before=st.sampled_from(["", "Let me see.", "Braces {} and <b>.\nThen"]),
)
def test_any_arguments_are_read_in_every_format(arguments, tool_call_format, tag, ascii_, before):
    def dump(value):
        return json.dumps(value, ensure_ascii=ascii_)

    if tag and "<|" in dump(arguments):
        return  # behind <|python_tag|> a spelled special token ends a call even within a string

    written = {
        "json": '{"type": "function", "name": "f", "parameters": ' + dump(arguments) + "}",
        "builtin": "f.call(" + ", ".join(f"{key}={dump(value)}" for key, value in arguments.items()) + ")",
        "function": f"<function=f>{dump(arguments)}</function>",
    }[tool_call_format]
    parsed = parse(before + ("<|python_tag|>" if tag else "\n" if before else "") + written)
    assert parsed == Parsed(before, [ToolCall("f", arguments, tool_call_format)], [])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", Parsed()),
        (" plain text \n", Parsed(" plain text \n")),
        ('{"name": "f", "parameters": {"a": 1}}', Parsed("", [F1])),
        ('{"name": "f", "arguments": {"a": 1}}', Parsed("", [F1])),
        ('{"parameters": {"a": 1}, "name": "f"}', Parsed("", [F1])),
        ('{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', Parsed("", [F1])),
        ('<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}<|eom_id|>', Parsed("", [F1])),
        ('Sure: {"name": "f", "parameters": {"a": 1}} Done.', Parsed("Sure: Done.", [F1])),
        ('{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', Parsed("", [F1, F1])),
        ('{"name": "f", "parameters": {"a": 1}}\n{"name": "f", "parameters": {"a": 1}}\n', Parsed("", [F1, F1])),
        ('{"name": "f", "parameters": {"a": 1}};;{"name": "f", "parameters": {"a": 1}};', Parsed("", [F1, F1])),
        ('<function=f>{"a": 1}</function><|eot_id|>', Parsed("", [ToolCall("f", {"a": 1}, "function")])),
        ('<function=f>{"a": 1}', Parsed("", [ToolCall("f", {"a": 1}, "function")])),
        ('<function=f>\n{"a": 1}\n</function>\n', Parsed("", [ToolCall("f", {"a": 1}, "function")])),
        ('brave_search.call(query="a \\"b\\"")', Parsed("", [ToolCall("brave_search", {"query": 'a "b"'}, "builtin")])),
        ("<|python_tag|>f.call(a=True, b=None)", Parsed("", [ToolCall("f", {"a": True, "b": None}, "builtin")])),
        ("<|python_tag|>f.call()<|eom_id|>", Parsed("", [ToolCall("f", {}, "builtin")])),
        ("<|python_tag|>print(1)\n", Parsed("", [ToolCall("code_interpreter", {"code": "print(1)\n"}, "builtin")])),
        (
            "I run it.\n<|python_tag|>x = {1: 2}\nprint(x)<|eom_id|>",
            Parsed("I run it.", [ToolCall("code_interpreter", {"code": "x = {1: 2}\nprint(x)"}, "builtin")]),
        ),
        (
            '<|python_tag|>{"a": 1}["a"]',
            Parsed("", [ToolCall("code_interpreter", {"code": '{"a": 1}["a"]'}, "builtin")]),
        ),
        (
            "<|python_tag|>f.call(a=1).strip()",
            Parsed("", [ToolCall("code_interpreter", {"code": "f.call(a=1).strip()"}, "builtin")]),
        ),
        ('{"name": "f", "parameters": {"s": "a\nb"}}', Parsed("", [ToolCall("f", {"s": "a\nb"}, "json")])),
        ("subprocess.call(['ls'])", Parsed("subprocess.call(['ls'])")),
        ("The value x.call(a=1) within a line", Parsed("The value x.call(a=1) within a line")),
        ('{"name": "Bob", "age": 3}', Parsed('{"name": "Bob", "age": 3}')),
        ("def f(): return {'a': 1}", Parsed("def f(): return {'a': 1}")),
        ("a < b; c > d; {x}", Parsed("a < b; c > d; {x}")),
    ],
)  # fmt: skip
def test_calls_and_content_of_examples(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"name": "f", "parameters": {"a": ', "the message ends within it"),
        ('<|python_tag|>{"name": "f", "parameters": {"a": ', "the message ends within it"),
        ('<|python_tag|>brave_search.call(query="x', "the message ends within it"),
        ('<function=f>{"a": 1', "the message ends within it"),
        ('{"name": "f", "parameters": "x"}', "parameters of f are str, not an object"),
        ('{"name": "f g", "parameters": {}}', "'f g' is no function name"),
        ('{"name": "f", "parameters": {"a" 1}}', "':' expected, not '1'"),
        ('{"name": "f", "parameters": {"a": 1 "b": 2}}', "',' or '}' expected"),
        ('{"name": "f", "parameters": {"a": +1}}', "a value expected, not '+'"),
        ('{"name": "f", "parameters": {"a": nil}}', "Expecting value"),
        ('{"name": "f", "parameters": {"a": NaN}}', "Out of range"),
        ('{"name": "f", "parameters": {"a": 1e999}}', "Out of range"),
        ('{"name": "f", "parameters": {"a": "\\ud800"}}', "surrogates not allowed"),
        ('{"name": "f", "parameters": {"a": ' + "[" * 100 + "]" * 100 + "}}", "nested more than 64 deep"),
        ("{\"name\": \"f\", \"parameters\": {\"a\": " + "1" * 5000 + "}}", "malformed call: an integer of more than 4,300 digits"),
        ("<function=f>a = 1</function>", "must be followed by a JSON object"),
        ("<function=f g>{}</function>", "'f ' is no function name"),
        ("f.call(a=1, a=2)", "f is given a twice"),
        ("f.call(a=1 b=2)", "',' or ')' expected"),
        ("f.call(query=`x`)", "a value expected"),
        ('{"name": "f", "parameters": {a: 1}}', "a key in quotes expected"),
        ("<function=f>{a: 1}</function>", "a key in quotes expected"),
        ('{"type": "function", "name": "f", "parameters": [1]}', "parameters of f are list, not an object"),
        ('[{"name": "f", "parameters": {}}, {"name": "g", "parameters": 3}]', "parameters of g are int"),
        ('[{"name": "f", "parameters": {}}', "the message ends within it"),
        ("<|python_tag|> ", "nothing follows"),
    ],
)  # fmt: skip
def test_malformed_calls_are_kept_and_reported(text, reason):
    parsed = parse(text)
    assert parsed.content == text
    assert parsed.calls == []
    assert len(parsed.errors) == 1
    assert reason in parsed.errors[0]


def test_a_good_call_survives_a_bad_one():
    parsed = parse('{"name": "f", "parameters": {"a" 1}}\n<function=f>{"a": 1}</function> and more')
    assert parsed.calls == [ToolCall("f", {"a": 1}, "function")]
    assert len(parsed.errors) == 1
    assert parsed.content == '{"name": "f", "parameters": {"a" 1}} and more'


def test_events_come_as_soon_as_they_are_certain():
    parser = ToolCallParser()
    assert parser.feed("Two words") == [Content("Two words")]
    assert parser.feed(' {"na') == []
    assert parser.feed("ive") == [Content(' {"naive')]
    assert parser.feed('\n{"name": "f", "param') == []
    events = parser.feed('eters": {}}')
    assert [type(event).__name__ for event in events] == ["Call"]
    assert parser.feed("\n<function=f>") == []
    events = parser.feed("no ")
    assert [type(event) for event in events] == [Malformed, Content]
    assert parser.finish() == [Content(" ")]
    assert parser.feed("f.call()") == []  # ready for the next message, whose start is a line's start
    assert len(parser.finish()) == 1


@pytest.mark.parametrize(
    "text",
    ['"name": "' * 5_000, '{"name": ' * 5_000, "<function=" * 5_000, "<" * 50_000, " " * 50_000, "a" * 50_000,
     '{"name":' + "[" * 50_000, "<|python_tag|>" * 3_000, "a.call(a=" * 5_000, '{"name": "' + "\\" * 50_000],
)  # fmt: skip
def test_long_hostile_text_is_parsed_in_time(text):
    parsed = parse(text)
    assert parsed.calls or parsed.content == text
