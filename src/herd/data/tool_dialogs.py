"""Turn tool dialogs into the form of OpenAI's API, with the tools' schemas next to the messages.

The dialogs of `dialogs.py` name their tools in a short system message, for models of a few million
parameters. A real chat model is given the schemas, in its own template, so these dialogs suit any checkpoint
that supports tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..text.messages import CODE_INTERPRETER
from ..tools import TOOLS
from .dialogs import Dialog, Message

_NAMED = "Tools as JSON: "
_INTERPRETER = "Environment: ipython"


def names_tools(dialog: Dialog) -> bool:
    """Return whether a dialog has a system message that names tools, in the JSON or the builtin format."""
    return any(map(_tools_named, dialog.messages))


def openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return a dialog's messages without the list of tools, and with results in the role ``tool``."""
    return [
        {**message, "role": "tool"} if message["role"] == "ipython" else dict(message)
        for message in messages
        if not _tools_named(message)
    ]


def schemas(dialog: Dialog) -> list[dict[str, Any]]:
    """Return the schemas of the tools that a dialog names."""
    return [TOOLS[name].schema for message in dialog.messages for name in _tools_named(message)]


def _tools_named(message: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools in a system message. The builtin format always has the interpreter."""
    content = message["content"] if message["role"] == "system" else ""
    if content.startswith(_NAMED):
        return content.removeprefix(_NAMED).split(", ")
    first, _, listed = content.partition("\nTools: ")
    return [CODE_INTERPRETER, *filter(None, listed.split(", "))] if first == _INTERPRETER else []
