"""Tool calls the way models really write them: the calls are found and the rest of the text is clean.

Each entry of `VARIANTS` is (text, content, calls as (name, arguments)).
"""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_toolcall import gather
from text_strategies import FRAGMENTS

from herd.text import Parsed, parse

A = ("f", {"a": 1})
PARIS = ("get_weather", {"city": "Paris"})

VARIANTS = {
    "parameters as a JSON string": [
        ('{"name": "f", "parameters": "{\\"a\\": 1}"}', "", [A]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [A]),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', "", [A]),
        ('{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', "", [A]),
        ('{"name": "f", "parameters": "{}"}', "", [("f", {})]),
        ('{"name": "f", "parameters": ""}', "", [("f", {})]),
        ('{"name": "f", "parameters": " \\n"}', "", [("f", {})]),
        ('{"name": "f", "parameters": "null"}', "", [("f", {})]),
        ('{"name": "f", "parameters": " {\\"a\\": 1} \\n"}', "", [A]),
        ("{\"name\": \"f\", \"parameters\": \"{'a': 1}\"}", "", [A]),
        ('{"name": "f", "parameters": "{\\"a\\": \\"x \\\\\\"y\\\\\\"\\"}"}', "", [("f", {"a": 'x "y"'})]),
        ('Sure. {"name": "f", "parameters": "{\\"a\\": 1}"} Done.', "Sure. Done.", [A]),
    ],
    "parameters null or absent": [
        ('{"name": "now", "parameters": null}', "", [("now", {})]),
        ('{"name": "now", "arguments": null}', "", [("now", {})]),
        ('{"name": "now"}', "", [("now", {})]),
        ('{"type": "function", "name": "now"}', "", [("now", {})]),
        ('{"name": "now", "type": "function"}', "", [("now", {})]),
        ('{"type": "function", "function": {"name": "now"}}', "", [("now", {})]),
        ('{"function": {"name": "now"}}', "", [("now", {})]),
        ('{"type": "function", "function": {"name": "now", "arguments": null}}', "", [("now", {})]),
        ('{"id": "1", "type": "function", "name": "now"}', "", [("now", {})]),
        ('Let me look.\n{"name": "now"}', "Let me look.", [("now", {})]),
        ("{'name': 'now', 'parameters': None}", "", [("now", {})]),
        ('{"name": "now"}; {"name": "f", "parameters": {"a": 1}}', "", [("now", {}), A]),
    ],
    "the name as function": [
        ('{"function": "f", "parameters": {"a": 1}}', "", [A]),
        ('{"function": "f", "arguments": {"a": 1}}', "", [A]),
        ('{"type": "function", "function": "f", "parameters": {"a": 1}}', "", [A]),
        ('{"parameters": {"a": 1}, "function": "f"}', "", [A]),
        ('{"arguments": {"a": 1}, "type": "function", "function": "f"}', "", [A]),
        ('{"function": "f"}', "", [("f", {})]),
        ('{"function": "f", "parameters": null}', "", [("f", {})]),
        ('{"function": "f", "parameters": "{\\"a\\": 1}"}', "", [A]),
        ("{'function': 'f', 'parameters': {'a': 1}}", "", [A]),
        ('{"type": "function", "function": {"name": "f"}, "parameters": {"a": 1}}', "", [A]),
        ('{"id": "x", "function": "f", "arguments": {"a": 1}}', "", [A]),
    ],
    "a list of calls": [
        ('[{"name": "f", "parameters": {"a": 1}}]', "", [A]),
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "now", "parameters": {}}]', "", [A, ("now", {})]),
        ('[\n  {"name": "f", "parameters": {"a": 1}},\n  {"name": "now"}\n]\n', "", [A, ("now", {})]),
        ('[{"name": "f", "parameters": {"a": 1}},]', "", [A]),
        ('<|python_tag|>[{"name": "f", "parameters": {"a": 1}}]<|eom_id|>', "", [A]),
        ('Two calls:\n[{"name": "f", "arguments": {"a": 1}},{"name": "f", "arguments": {"a": 1}}]',
         "Two calls:", [A, A]),
        ('[{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}] Done.',
         " Done.", [A]),
        ("[{'name': 'f', 'parameters': {'a': 1}}]", "", [A]),
        ('[{"function": "f", "parameters": {"a": 1}}]', "", [A]),
        ('[{"name": "f", "parameters": {"a": [1, {"b": "]"}]}}]', "", [("f", {"a": [1, {"b": "]"}]})]),
        ('{"name": "f", "parameters": {"a": 1}}, {"name": "f", "parameters": {"a": 1}}', "", [A, A]),
        ('[{"name": "f", "parameters": {"a": 1}}]\n[{"name": "now"}]', "", [A, ("now", {})]),
    ],
    "a fence or tags around calls": [
        ('```json\n{"name": "f", "parameters": {"a": 1}}\n```', "", [A]),
        ('```\n{"name": "f", "parameters": {"a": 1}}\n```\n', "", [A]),
        ('```tool_call\n{"name": "f", "parameters": {"a": 1}}\n```', "", [A]),
        ('```json\n[{"name": "f", "parameters": {"a": 1}}, {"name": "now"}]\n```', "", [A, ("now", {})]),
        ('```json {"name": "f", "parameters": {"a": 1}} ```', "", [A]),
        ('```{"name": "f", "parameters": {"a": 1}}```', "", [A]),
        ('Sure:\n```json\n{"name": "f", "parameters": {"a": 1}}\n```\nDone.', "Sure:\nDone.", [A]),
        ('```json\n{"name": "f", "parameters": {"a": 1}}', "", [A]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [A]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "now"}</tool_call>',
         "", [A, ("now", {})]),
        ('I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n', "I look.", [A]),
        ('<tool_call>\n```json\n{"name": "f", "arguments": {"a": 1}}\n```\n</tool_call>', "", [A]),
        ('<tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call> ok', " ok", [A]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [A]),
        ('```python\nget_weather.call(city="Paris")\n```', "", [PARIS]),
        ('<|python_start|>[get_weather(city="Paris")]<|python_end|>', "", [PARIS]),
        ('<tool_call><function=f>{"a": 1}</function></tool_call>', "", [A]),
        ('```python\nx = 1\n```\n{"name": "f", "parameters": {"a": 1}}', "```python\nx = 1\n```", [A]),
        ('{"name": "f", "parameters": {"a": 1}}\n```python\nx = 1\n```', "\n```python\nx = 1\n```", [A]),
    ],
    "pythonic lists": [
        ('[f(x="y"), g()]', "", [("f", {"x": "y"}), ("g", {})]),
        ('[get_weather(city="Paris")]', "", [PARIS]),
        ("[get_weather(city='Paris')]", "", [PARIS]),
        ("[f(a=1)]\n", "", [A]),
        ("[ f( a = 1 ) , g( ) ]", "", [A, ("g", {})]),
        ("[f(a=True, b=None, c=-1.5, d=[1, 2], e={'k': \"v\"})]",
         "", [("f", {"a": True, "b": None, "c": -1.5, "d": [1, 2], "e": {"k": "v"}})]),
        ("<|python_tag|>[f(a=1)]<|eom_id|>", "", [A]),
        ("Let me call it.\n[f(a=1)]", "Let me call it.", [A]),
        ("[\n    f(a=1),\n    g(),\n]", "", [A, ("g", {})]),
        ("```python\n[f(a=1)]\n```", "", [A]),
        ("<tool_call>[f(a=1)]</tool_call>", "", [A]),
        ("[math.sqrt(x=4)]", "", [("math.sqrt", {"x": 4})]),
        ("[get_weather.call(city=\"Paris\")]", "", [PARIS]),
        ("[f(a=1)]; [g()]", "", [A, ("g", {})]),
        ("[f(s=\"it's ](\")]", "", [("f", {"s": "it's ]("})]),
    ],
    "single quotes": [
        ("{'name': 'f', 'parameters': {'a': 1}}", "", [A]),
        ("{'type': 'function', 'name': 'f', 'parameters': {'a': 1}}", "", [A]),
        ("{\"name\": 'f', 'parameters': {\"a\": 1}}", "", [A]),
        ("{'name': 'f', 'parameters': {'a': 'it\\'s'}}", "", [("f", {"a": "it's"})]),
        ("{'name': 'f', 'parameters': {'a': 'say \"hi\"'}}", "", [("f", {"a": 'say "hi"'})]),
        ("{'name': 'f', 'parameters': {'a': True, 'b': None, 'c': false}}",
         "", [("f", {"a": True, "b": None, "c": False})]),
        ("{'name': 'f', 'parameters': {'a': 'x\\ny', 'b': '\\u00e9'}}", "", [("f", {"a": "x\ny", "b": "é"})]),
        ("<function=f>{'a': 1}</function>", "", [A]),
        ("f.call(a='x')", "", [("f", {"a": "x"})]),
        ("<|python_tag|>f.call(a='it\\'s')", "", [("f", {"a": "it's"})]),
        ("Sure: {'name': 'f', 'parameters': {'a': 1}}", "Sure:", [A]),
        ("{'name': 'f', 'parameters': '{\"a\": 1}'}", "", [A]),
        ("{'name': 'f', 'parameters': {'a': 1,}}", "", [A]),
    ],
    "other keys": [
        ('{"name": "f", "args": {"a": 1}}', "", [A]),
        ('{"name": "f", "params": {"a": 1}}', "", [A]),
        ('{"tool": "f", "args": {"a": 1}}', "", [A]),
        ('{"tool_name": "f", "parameters": {"a": 1}}', "", [A]),
        ('{"args": {"a": 1}, "name": "f"}', "", [A]),
        ('{"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}}', "", [A]),
        ('{"type": "function", "function": {"name": "f", "args": "{\\"a\\": 1}"}}', "", [A]),
        ("[{'name': 'f', 'args': {'a': 1}}, {'tool': 'now', 'args': {}}]", "", [A, ("now", {})]),
    ],
    "calls under a key": [
        ('{"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}', "", [A]),
        ('{"tool_calls": [{"name": "f", "args": {"a": 1}}, {"name": "now"}]}', "", [A, ("now", {})]),
        ('{"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}',
         "", [A]),
        ('{"tool_calls": [{"name": "now", "arguments": {}}], "content": null}', "", [("now", {})]),
        ('{"tool_call": {"name": "f", "arguments": {"a": 1}}}', "", [A]),
        ('{"function_call": {"name": "f", "arguments": "{\\"a\\": 1}"}}', "", [A]),
        ('Wait.\n```json\n{"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}\n```\n', "Wait.", [A]),
        ('[{"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}, {"name": "now"}]', "", [A, ("now", {})]),
        ('{"tool_calls": []}', '{"tool_calls": []}', []),
        ('{"tool_calls": 3}', '{"tool_calls": 3}', []),
        ('{"tool_calls": ["f"]}', '{"tool_calls": ["f"]}', []),
        ('{"function_call": "auto"}', '{"function_call": "auto"}', []),
        ('{"tool_calls": [{"name": "now"}], "total": 1}', '{"tool_calls": [{"name": "now"}], "total": 1}', []),
    ],
    "other tags": [
        ('<function_call>{"name": "f", "arguments": {"a": 1}}</function_call>', "", [A]),
        ('<function_call>\n{"name": "f", "args": {"a": 1}}\n</function_call>\nDone.', "\nDone.", [A]),
        ("<functioncall> {\"name\": \"f\", \"arguments\": '{\"a\": 1}'} ", "", [A]),
        ('<tool_calls>[{"name": "f", "arguments": {"a": 1}}, {"name": "now"}]</tool_calls>', "", [A, ("now", {})]),
        ('<tool_calls>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n</tool_calls>', "", [A]),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>', "", [A]),
        ("<function_call> is a tag", "<function_call> is a tag", []),
    ],
    "no calls": [
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ('{"name": "Bob", "id": 7}', '{"name": "Bob", "id": 7}', []),
        ('[{"name": "Bob", "age": 3}]', '[{"name": "Bob", "age": 3}]', []),
        ("[1, 2, 3]", "[1, 2, 3]", []),
        ("[x for x in range(3)]", "[x for x in range(3)]", []),
        ("[a](http://b.c) and [d]", "[a](http://b.c) and [d]", []),
        ("[ ] to do\n[x] done", "[ ] to do\n[x] done", []),
        ("In a line [f(a=1)] it is text", "In a line [f(a=1)] it is text", []),
        ('```python\nprint("hi")\n```', '```python\nprint("hi")\n```', []),
        ('```json\n{"a": 1}\n```\n', '```json\n{"a": 1}\n```\n', []),
        ("```\n```", "```\n```", []),
        ("Use `x` and ``y`` and ```z```.", "Use `x` and ``y`` and ```z```.", []),
        ("<tool_call>not a call</tool_call>", "<tool_call>not a call</tool_call>", []),
        ("```python\nx = {'a': 1}\n```\n\n```sh\nls\n```",
         "```python\nx = {'a': 1}\n```\n\n```sh\nls\n```", []),
        ("f(a=1)", "f(a=1)", []),
        ("print(end='')\n", "print(end='')\n", []),
        ("a, b; c", "a, b; c", []),
    ],
}  # fmt: skip
CASES = [(kind, *case) for kind, cases in VARIANTS.items() for case in cases]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES)
def test_calls_are_found_and_the_text_is_clean(kind, text, content, calls):
    parsed = parse(text)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert (parsed.content, parsed.errors) == (content, [])


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_variant_streams_to_the_same_result(kind):
    for text, _, _ in VARIANTS[kind]:
        whole = parse(text)
        assert gather(list(text)) == whole
        for cut in range(len(text) + 1):
            assert gather([text[:cut], text[cut:]]) == whole


OFFERED = {"f", "now"}
ALICE = '{"name": "Alice", "parameters": {"role": "admin"}}'


@pytest.mark.parametrize(
    "text",
    [
        ALICE, f"Here: {ALICE} Good?", f"[{ALICE}]", f"```json\n{ALICE}\n```", '{"tool": "saw", "args": {}}',
        '{"name": "Rex"}', '[print(end="x")]', 'subprocess.call(args="ls")',
    ],
)  # fmt: skip
def test_text_of_the_form_of_a_call_is_text_if_it_names_no_tool_that_was_offered(text):
    for pieces in ([text], list(text)):
        assert gather(pieces, OFFERED) == Parsed(text)


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES)
def test_calls_of_tools_that_were_offered_are_found(kind, text, content, calls):
    assert gather([text], {name for name, _ in calls} or OFFERED) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "function", "name": "Alice", "parameters": {}}', '<function=Alice>{}</function>',
        '<tool_call>{"name": "Alice", "arguments": {}}</tool_call>', '<|python_tag|>Alice.call()',
        '{"tool_calls": [{"name": "Alice", "arguments": {}}]}', '{"function": {"name": "Alice"}}',
        '[{"name": "now"}, {"name": "Alice"}]',
    ],
)  # fmt: skip
def test_what_says_that_it_is_a_call_is_one_of_a_tool_that_does_not_exist(text):
    for pieces in ([text], list(text)):
        assert gather(pieces, OFFERED).calls[-1].name == "Alice"


def test_a_call_after_a_tag_that_was_closed_is_judged_by_its_name():
    text = f'<tool_call>{{"name": "now"}}</tool_call>{ALICE}'
    assert (gather([text], OFFERED).content, len(gather([text], OFFERED).calls)) == (ALICE, 1)


PIECES = [text for _, text, _, _ in CASES] + [
    *FRAGMENTS, "```", "```json\n", "<tool_call>", "</tool_call>", "[", "]", "[f(", "'", '"', ",", ")", "}", ": ",
    '{"name": "f", "parameters": ', "{'name': 'f', ", "[{'name':", "\\", "<|python_tag|>", "\n", " ",
]  # fmt: skip


@settings(max_examples=300)
@given(pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8), data=st.data())
def test_streaming_equals_parsing_the_whole_text(pieces, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    for names in (None, OFFERED):
        whole = gather([text], names)
        assert gather([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])], names) == whole
        assert gather(list(text), names) == whole


@settings(max_examples=300)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=6))
def test_text_without_calls_is_kept(pieces):
    text = "".join(pieces)
    parsed = parse(text)
    for call in parsed.calls:
        json.dumps(call.arguments, allow_nan=False)
    if not parsed.calls:
        assert parsed.content == text.replace("<|eom_id|>", "").replace("<|eot_id|>", "")
