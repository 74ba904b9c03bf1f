"""Turn tool dialogs into the form of OpenAI's API, with the tools' schemas next to the messages.

The dialogs of `dialogs.py` name their tools in a short system message, for models of a few million
parameters. A real chat model is given the schemas, in its own template, so these dialogs suit any checkpoint
that supports tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tools import CUSTOM_TOOLS
from .dialogs import Dialog, Message

_NAMED = "Tools as JSON: "


def names_tools(dialog: Dialog) -> bool:
    """Return whether a dialog has a system message that names tools in the JSON format."""
    return any(map(_names_tools, dialog.messages))


def openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return a dialog's messages without the list of tools, and with results in the role ``tool``."""
    return [
        {**message, "role": "tool"} if message["role"] == "ipython" else dict(message)
        for message in messages
        if not _names_tools(message)
    ]


def schemas(dialog: Dialog) -> list[dict[str, Any]]:
    """Return the schemas of the tools that a dialog names."""
    named = next(message["content"] for message in dialog.messages if _names_tools(message))
    return [CUSTOM_TOOLS[name].schema for name in named.removeprefix(_NAMED).split(", ")]


def _names_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "system" and message["content"].startswith(_NAMED)
