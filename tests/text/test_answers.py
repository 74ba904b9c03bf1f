"""Reasoning, content and calls in answers. An answer that is streamed gives the same as a whole one."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.text import AnswerParser, Call, Content, Parsed, Reasoning, ToolCall

PIECES = [
    "<think>", "</think>", "<thi", "nk>", "</", "think>", "\n", " ", "a", "é", "<", "6 * 8 = 48", "</s>",
    "[TOOL_CALLS]", '[{"name": "f", "arguments": {"a": 1}}]', "[TOOL", "_CALLS]", "<tool_call>", "</tool_call>",
]  # fmt: skip
MODES = [
    {},
    {"tools": True},
    {"reasoning": True},
    {"reasoning": True, "tools": True, "drops_space": True},
    {"reasoning": True, "opened": True},
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(MODES), st.randoms())
def test_a_streamed_answer_is_parsed_like_a_whole_one(text, mode, rng: random.Random):
    whole = AnswerParser(**mode).parse(text)
    parser, streamed = AnswerParser(**mode), Parsed()
    rest = text
    while rest:
        n = rng.randrange(1, 5)
        for event in parser.feed(rest[:n]):
            streamed.add(event)
        rest = rest[n:]
    for event in parser.finish():
        streamed.add(event)
    assert streamed == whole


@pytest.mark.parametrize(
    "mode, text, reasoning, content",
    [
        ({"reasoning": True}, "<think>\n6 * 8\n</think>\n\nIt is 48.", "6 * 8", "It is 48."),
        ({"reasoning": True}, "\n<think></think>48", "", "48"),
        ({"reasoning": True, "opened": True}, "6 * 8\n</think>\n\n48", "6 * 8", "48"),
        ({"reasoning": True, "opened": True}, "6 * 8 and then", "6 * 8 and then", ""),
        ({"reasoning": True}, "A <think> in the text</think>", "", "A <think> in the text</think>"),
        ({"reasoning": True}, "  48", "", "  48"),
        ({}, "<think>text</think>", "", "<think>text</think>"),
        ({"drops_space": True}, " 48", "", "48"),
        ({"drops_space": True}, "  48", "", " 48"),
    ],
)
def test_reasoning_is_kept_apart_from_the_content(mode, text, reasoning, content):
    assert AnswerParser(**mode).parse(text) == Parsed(content, reasoning=reasoning)


def test_reasoning_streams_without_waiting_for_its_end():
    parser = AnswerParser(reasoning=True)
    assert parser.feed("<think>first thought") == [Reasoning("first thought")]
    assert parser.feed(" and </") == [Reasoning(" and")]
    assert parser.feed("more</think>") == [Reasoning(" </more")]
    assert parser.feed("\n\n48") == [Content("48")]
    assert parser.finish() == []


CALL = ToolCall("f", {"a": 1}, "json")


@pytest.mark.parametrize(
    "text, content",
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', ""),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abc123def"}]</s>', ""),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', ""),
        ('Let me see. [TOOL_CALLS]f[ARGS] {"a": 1}</s>', "Let me see."),
        ('Let me see. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "Let me see."),
    ],
)
def test_mistrals_calls_are_found_where_tools_were_offered(text, content):
    parsed = AnswerParser(tools=True).parse(text)
    assert (parsed.calls, parsed.content.rstrip()) == ([CALL], content)
    assert AnswerParser().parse(text) == Parsed(text)


def test_a_mark_of_calls_without_any_is_text():
    mark = "[TOOL_CALLS]"
    for text in (mark, f"{mark} and text", f"see {mark} there", "[TOOLS]", "f[ARGS]", "f[ARGUMENT]{}"):
        assert AnswerParser(tools=True).parse(text) == Parsed(text)


def test_a_call_after_reasoning_is_a_call():
    parser = AnswerParser(tools=True, reasoning=True)
    text = '<think>I need f.</think>\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    events = [*parser.feed(text), *parser.finish()]
    assert events == [Reasoning("I need f."), Call(CALL)]
