"""Dialogs as clients send them become dialogs that chat formats render."""

import pytest

from herd.serve.dialog import read_messages, shape_dialog
from herd.serve.errors import ApiError
from herd.serve.tools import OfferedTool, ToolChoice, ToolOffer, read_tool_choice, read_tools

USER = {"role": "user", "content": "hi"}


def call(id_, name="f", arguments="{}"):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_system_messages_at_the_beginning_become_one_and_a_later_one_is_the_users():
    warnings: list[str] = []
    messages = [
        {"role": "system", "content": "A"},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "B"}, {"type": "input_text", "text": "C"}],
        },
        USER,
        {"role": "system", "content": "D"},
    ]
    assert read_messages(messages, warnings) == [
        {"role": "system", "content": "A\n\nBC"},
        USER,
        {"role": "user", "content": "D"},
    ]
    assert warnings == [
        "messages[3]=a system message after the beginning is shown to the model as the user's"
    ]


def test_results_are_put_into_the_order_of_their_calls():
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b"), call("c")]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        USER,
    ]
    out = read_messages(messages, [])
    assert [message["content"] for message in out[2:5]] == ["1", "2", "3"]
    assert out[5] == USER
    assert out[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ([1, "x"], '[1, "x"]'),
        ([], "[]"),
        (["a", "b"], '["a", "b"]'),
        ([{"id": 1}], '[{"id": 1}]'),
        ([{"type": "bird", "text": "tit"}], '[{"type": "bird", "text": "tit"}]'),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (42, "42"),
        (True, "true"),
        ({"é": "<|eot_id|>"}, '{"é": "<|eot_id|>"}'),
    ],
)
def test_what_a_tool_gave_back_may_be_any_json(content, shown):
    asked = {"role": "assistant", "content": None, "tool_calls": [call("a")]}
    out = read_messages([USER, asked, {"role": "tool", "tool_call_id": "a", "content": content}], [])
    assert out[-1]["content"] == shown
    step = {"id": "a", "name": "f", "arguments": "{}", "content": content}
    out = read_messages([USER, {"role": "assistant", "content": "Done.", "herd_steps": [step]}], [])
    assert out[-2]["content"] == shown


@pytest.mark.parametrize("content", [None, [{"type": "image_url"}], float("inf")])
def test_what_a_tool_cannot_have_given_back_is_refused(content):
    asked = {"role": "assistant", "content": None, "tool_calls": [call("a")]}
    with pytest.raises(ApiError) as error:
        read_messages([USER, asked, {"role": "tool", "tool_call_id": "a", "content": content}], [])
    assert str(error.value.param).startswith("messages[2].content")


@pytest.mark.parametrize("content", [{"a": 1}, [1], 3, None])
def test_only_a_tool_may_write_anything_but_text(content):
    with pytest.raises(ApiError) as error:
        read_messages([{"role": "user", "content": content}], [])
    assert str(error.value.param).startswith("messages[0].content")


@pytest.mark.parametrize(
    ("calls", "param"),
    [
        ("x", "messages[0].tool_calls"),
        ([{}], "messages[0].tool_calls[0]"),
        ([call("a", arguments="{")], "messages[0].tool_calls[0].function.arguments"),
        ([call("a", arguments="[1]")], "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_malformed_calls_are_named(calls, param):
    with pytest.raises(ApiError) as error:
        read_messages([{"role": "assistant", "tool_calls": calls}], [])
    assert error.value.param == param


class NoTools:
    supports_tools = False
    tool_call_formats = ()


def test_a_template_without_tools_gets_them_as_text_and_a_warning():
    warnings: list[str] = []
    messages = read_messages(
        [
            USER,
            {"role": "assistant", "content": "Wait.", "tool_calls": [call("a", arguments='{"x": 1}')]},
            {"role": "tool", "tool_call_id": "a", "content": "42"},
        ],
        warnings,
    )
    tool = OfferedTool("f", "Does f.", {"type": "object"})
    dialog = shape_dialog(messages, [tool], NoTools(), warnings)
    assert dialog.tools is None
    system, user, assistant, result = dialog.messages
    assert '"name": "f", "description": "Does f."' in system["content"]
    assert user == USER
    assert assistant["content"] == 'Wait.\n{"type": "function", "name": "f", "parameters": {"x": 1}}'
    assert result == {"role": "user", "content": "42"}
    assert len(warnings) == 1
    assert shape_dialog([USER], [], NoTools(), []).messages == [USER]


def test_tools_in_both_forms_namespaces_and_hosted_types():
    warnings: list[str] = []
    tools = read_tools(
        [
            {"type": "function", "function": {"name": "nested", "strict": True, "parameters": {}}},
            {"type": "function", "name": "flat", "description": "Flat.", "strict": False},
            {
                "type": "namespace",
                "name": "mcp",
                "tools": [{"type": "function", "name": "run"}, {"type": "custom", "name": "x"}],
            },
            {"type": "web_search"},
            {"type": "image_generation"},
        ],
        warnings,
        ToolOffer(10),
    )
    names = [("nested", "", ""), ("flat", "", ""), ("mcp__run", "run", "mcp")]
    assert [(tool.name, tool.name_inside, tool.namespace) for tool in tools] == names
    assert [tool.strict for tool in tools] == [True, False, False]
    places = ["tools[2].tools[1]", "tools[3]", "tools[4]"]
    assert [warning.partition("=")[0] for warning in warnings] == places
    with pytest.raises(ApiError, match="limit is 2"):
        read_tools([{"type": "function", "name": f"f{i}"} for i in range(3)], [], ToolOffer(2))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "g"}}, ToolChoice("required", ("g",))),
        ({"type": "function", "name": "g"}, ToolChoice("required", ("g",))),
        ({"type": "function", "name": "run", "namespace": "mcp"}, ToolChoice("required", ("mcp__run",))),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "g"}}]},
            },
            ToolChoice("required", ("g",)),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}, ToolChoice("auto", ("g",))),
    ],
)
def test_tool_choices(choice, expected):
    tools = (OfferedTool("g"), OfferedTool("mcp__run", namespace="mcp"))
    assert read_tool_choice(choice, tools, []) == expected


@pytest.mark.parametrize("choice", ["sometimes", 3, {}, {"type": "function", "name": "missing"}, {"type": 5}])
def test_tool_choices_that_are_refused(choice):
    with pytest.raises(ApiError) as error:
        read_tool_choice(choice, (OfferedTool("g"),), [])
    assert error.value.param == "tool_choice"
