"""Check the messages of a dialog and bring them into one shape, for every chat format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ChatError

CODE_INTERPRETER = "code_interpreter"
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
         "ipython": "tool", "tool": "tool"}  # fmt: skip


@dataclass(frozen=True)
class CallInMessage:
    """A call of a tool in an assistant's message."""

    name: str
    arguments: dict[str, Any]
    id: str | None
    tool_call_format: str | None  # None: the dialog's

    @property
    def code(self) -> str | None:
        """The program, if it is a call of the code interpreter with nothing else."""
        code = self.arguments.get("code")
        alone = self.name == CODE_INTERPRETER and len(self.arguments) == 1
        return code if alone and isinstance(code, str) else None


@dataclass(frozen=True)
class CheckedMessage:
    """A message with its role (system, user, assistant or tool) and its content as text.

    ``original`` is the message before the check, ``index`` its position, or None if a renderer added it.
    """

    role: str
    content: str
    calls: tuple[CallInMessage, ...] = ()
    index: int | None = None
    original: Mapping[str, Any] | None = None


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[CheckedMessage]:
    """Return the messages in one shape. Raises `ChatError`, which names the message, for what is not one."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ChatError("messages is empty: a dialog has at least one message")
    return [_checked(message, index) for index, message in enumerate(messages)]


def tool_schema(tool: Any, where: str) -> tuple[str, dict[str, Any] | None]:
    """Return a tool's name and its bare schema; None for a builtin tool, which is given by its name only."""
    schema = tool.get("function", tool) if isinstance(tool, Mapping) else {"name": tool}
    name = schema.get("name") if isinstance(schema, Mapping) else None
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ChatError(f"{where}: name {name!r} must be letters, digits, '_', '.', '-'")
    return name, None if isinstance(tool, str) else dict(schema)


def json_text(value: Any, where: str, indent: int | None = None) -> str:
    """Return a value as JSON. Raises `ChatError`, which begins with ``where``."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}: cannot be written as JSON ({json_problem(error)})") from error


def json_problem(error: Exception) -> str:
    """Return what is wrong with JSON in words for a user, who cannot set Python's limit on digits."""
    text = str(error)
    return "an integer of more than 4,300 digits" if text.startswith("Exceeds the limit") else text


def _checked(message: Mapping[str, Any], index: int) -> CheckedMessage:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be a dict with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ChatError(f"{where}: role {role!r} is unknown: use one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or ()
    if calls and role != "assistant":
        raise ChatError(f"{where}: tool_calls in a {role} message; only an assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ChatError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    content = _content_text(message.get("content"), ROLES[role], where)
    checked = tuple(_checked_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls))
    return CheckedMessage(ROLES[role], content, checked, index, message)


def _content_text(content: Any, role: str, where: str) -> str:
    """Return a message's content as text: text parts joined, other results of tools as JSON."""
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if isinstance(content, Sequence) and not (role == "tool" and not content):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
    if role == "tool" and content is not None:
        return json_text(content, where)
    what = "a part that is not text" if isinstance(content, Sequence) else type(content).__name__
    raise ChatError(f"{where}: content must be text or a list of parts of type 'text', not {what}")


def _checked_call(call: Any, where: str) -> CallInMessage:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping):
        raise ChatError(f"{where} must be a dict with name and arguments")
    name, arguments = inner.get("name"), inner.get("arguments")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ChatError(
            f"{where}: name {name!r} must begin with a letter and hold letters, digits, '_', '.', '-' only"
        )
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ChatError(f"{where}: arguments are not JSON ({json_problem(error)})") from error
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ChatError(f"{where}: arguments must be a dict with str keys, not {type(arguments).__name__}")
    json_text(arguments, f"{where}: arguments")  # refuses what no format can write, such as infinity
    id_, own = call.get("id"), call.get("tool_call_format")
    if not isinstance(own, str | None):
        raise ChatError(f"{where}: tool_call_format {own!r} is not a name")
    return CallInMessage(name, arguments, id_ if isinstance(id_, str) else None, own)
