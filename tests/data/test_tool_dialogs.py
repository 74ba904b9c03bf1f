"""Tool dialogs in the form of OpenAI's API: the tools that the system message names become schemas."""

import pytest

from herd.data.dialogs import make_dialogs
from herd.data.tool_dialogs import names_tools, openai_messages, schemas
from herd.tools import TOOLS


@pytest.mark.parametrize(
    "system, names",
    [
        ("Environment: ipython", ["code_interpreter"]),
        ("Environment: ipython\nTools: wolfram_alpha", ["code_interpreter", "wolfram_alpha"]),
        ("Tools as JSON: calculator, upper", ["calculator", "upper"]),
    ],
)
def test_named_tools_become_schemas(system, names):
    dialogs = make_dialogs(
        400, 0, languages=["en"], tool_call_formats=["json", "builtin"], tasks=["arithmetic"]
    )
    dialog = next(each for each in dialogs if each.messages[0]["content"] == system)
    assert names_tools(dialog)
    assert schemas(dialog) == [TOOLS[name].schema for name in names]
    messages = openai_messages(dialog.messages)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert [message["content"] for message in messages] == [m["content"] for m in dialog.messages[1:]]
    assert messages[1]["tool_calls"] == [dialog.call]


def test_a_dialog_without_tools_names_none():
    dialogs = make_dialogs(50, 0, languages=["en"], tool_call_formats=["json"], tasks=["chat"])
    dialog = next(each for each in dialogs if each.messages[0]["role"] == "user")
    assert not names_tools(dialog)
    assert openai_messages(dialog.messages) == list(dialog.messages)
