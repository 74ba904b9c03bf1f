"""The one renderer: a dialog in, token ids and a loss mask out, exactly in Llama 3.1's format.

Training, chat, serving and evaluation all take their ids from here, so that a model is asked in the tokens it was
trained on. A dialog is ``<|begin_of_text|>`` and then per message
``<|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>``; special tokens are put in as ids, and contents are
encoded as plain text, so nothing a user writes can end a turn or start one. Header and content are encoded apart, as
Meta's code does: whatever a content begins with, it is trained after the very header tokens it is generated after.

Tools come in three forms, all documented with Llama 3.1:

========  =============================================  ====================================================
form      how the model learns of its tools              how it calls one
========  =============================================  ====================================================
json      user message with JSON schemas                 ``{"type": "function", "name": …, "parameters": {…}}``
builtin   system: ``Environment: ipython``, ``Tools: a`` ``<|python_tag|>name.call(query="…")<|eom_id|>``
function  user message with schemas and instructions     ``<function=name>{…}</function>``
========  =============================================  ====================================================

A tool given as a bare name ("brave_search"), and ``code_interpreter`` in whichever way, is builtin in every form; the
code interpreter is called by ``<|python_tag|>`` and then just code. ``<|eom_id|>`` ends a message that waits for a tool
within the ipython environment; ``<|eot_id|>`` ends every other. Nothing is put into the system message unless asked
for: the knowledge and today's date come with ``date``, the environment with builtin tools.

A call that says its own form keeps it, so that a history is rendered as it was generated, however odd: whatever
`toolcall.parse` finds in a message can be rendered again.

Source: llama-models ``models/llama3_1/prompt_format.md``, ``models/llama3/chat_format.py`` and ``prompt_templates/``.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from ..errors import ChatError
from .tokenizer import Tokenizer

TOOL_CALL_FORMATS = ("json", "builtin", "function")
CODE_INTERPRETER = "code_interpreter"
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "ipython": "ipython",
    "tool": "ipython",
}
# fmt: off
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)
# fmt: on

# The same format for other programs: `render` as a Jinja template, for tokenizer_config.json. Its variables are
# `tools`, `builtin_tools` (names), `tool_call_format`, `date_string` and `add_generation_prompt`. The ids are equal
# except where Jinja cannot help it: a content that begins with a line break is merged with the header's line breaks,
# and a content that spells a special token becomes that token.
CHAT_TEMPLATE = files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")

JSON_INTRODUCTION = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
JSON_REQUEST = "Return function calls in JSON format."
FUNCTION_INTRODUCTION = "You have access to the following functions:\n\n"
FUNCTION_REQUEST = (
    "Think very carefully before calling functions.\n"
    "If you choose to call a function ONLY reply in the following format with no prefix or suffix:\n\n"
    '<function=example_function_name>{"example_name": "example_value"}</function>\n\n'
    "Reminder:\n"
    "- If looking for real time information use relevant functions before falling back to brave_search\n"
    "- Function calls MUST follow the specified format, start with <function= and end with </function>\n"
    "- Required parameters MUST be specified\n"
    "- Only call one function at a time\n"
    "- Put the entire function call reply on one line"
)


@dataclass(frozen=True)
class Span:
    """One message's tokens ``ids[start:end]``, header and ending included. ``message`` is its index in the dialog, None
    where the renderer added it (tool descriptions, or a system message with only the environment or date)."""

    role: str
    start: int
    end: int
    message: int | None


@dataclass
class Rendered:
    """``ids`` (T) and ``mask`` (T): True exactly on tokens an assistant writes, its ending token included."""

    ids: list[int]
    mask: list[bool]
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: dict[str, Any]
    tool_call_format: str
    own_format: bool  # given with the call, not by the dialog


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str
    calls: tuple[_Call, ...]
    index: int | None


@dataclass(frozen=True)
class _Tools:
    builtin: tuple[str, ...]
    custom: tuple[dict[str, Any], ...]


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[str | Mapping[str, Any]] | None = None,
    tool_call_format: str = "json",
    generation_prompt: bool = False,
    date: str | datetime.date | None = None,
) -> Rendered:
    """Token ids and loss mask of a dialog.

    ``messages``: ``{"role": system|user|assistant|ipython|tool, "content": str}``; an assistant's may hold
    ``"tool_calls": [{"name", "arguments": dict}]`` (OpenAI's nesting under ``"function"`` is accepted, and a call's
    own ``"tool_call_format"`` overrides the dialog's). ``tools``: JSON schemas ``{"name", "description",
    "parameters"}``, bare or as OpenAI wraps them, or names of builtin tools. ``date``: text or date for "Today
    Date". With ``generation_prompt`` the header of the assistant's next message is added; the result is then the
    beginning of what `render` gives for the longer dialog.

    Raises `ChatError` for what the format cannot express and `TokenizerError` for text that is not Unicode.
    """
    if tool_call_format not in TOOL_CALL_FORMATS:
        raise ChatError(
            f"tool_call_format={tool_call_format!r} is unknown: use one of {', '.join(TOOL_CALL_FORMATS)}"
        )
    tokenizer.require_chat_format()
    turns = _turns(messages, tool_call_format)
    known = _tools(tools, tool_call_format)
    rendered = Rendered([tokenizer.bos_id], [False])
    head = _system_head(known.builtin, _date_text(date))
    if turns[0].role == "system" or head:
        own = turns.pop(0) if turns and turns[0].role == "system" else _Turn("system", "", (), None)
        text = "\n\n".join(part for part in (head, own.content) if part)
        _add_text(rendered, tokenizer, _Turn("system", text, (), own.index))
    if known.custom:
        _add_text(rendered, tokenizer, _Turn("user", _describe(known.custom, tool_call_format), (), None))
    for turn in turns:
        if turn.role == "assistant":
            _add_assistant(rendered, tokenizer, turn, known)
        else:
            _add_text(rendered, tokenizer, turn)
    if generation_prompt:
        _extend(rendered, _header(tokenizer, "assistant"), trained=False)
    return rendered


def render_document(text: str, tokenizer: Tokenizer) -> Rendered:
    """A document for a base model: begin_of_text, the text, end_of_text; all but the first is trained."""
    ids = tokenizer.encode(text, bos=True, eos=True)
    return Rendered(ids, [False] + [True] * (len(ids) - 1), [Span("document", 0, len(ids), 0)])


def tool_output(*, ok: bool, stdout: str = "", stderr: str = "") -> str:
    """Content of the ipython message after code ran: ``completed`` or ``failed``, then what it printed."""
    text = "completed" if ok else "failed"
    for name, printed in (("stdout", stdout), ("stderr", stderr)):
        if printed:
            text += f"\n[{name}]{printed}[/{name}]"
    return text


# Checking what came in


def _turns(messages: Sequence[Mapping[str, Any]], tool_call_format: str) -> list[_Turn]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ChatError("messages is empty: a dialog has at least one message")
    turns: list[_Turn] = []
    waiting = 0  # tool results the last assistant message still may get
    for index, message in enumerate(messages):
        turn = _turn(message, index, tool_call_format)
        if turn.role == "system" and index > 0:
            raise ChatError(f"messages[{index}]: the system message must be the first")
        if turn.role == "ipython":
            if waiting == 0:
                raise ChatError(f"messages[{index}]: a tool result without a call before it")
            waiting -= 1
        else:
            waiting = len(turn.calls)
        turns.append(turn)
    return turns


def _turn(message: Mapping[str, Any], index: int, tool_call_format: str) -> _Turn:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be a dict with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatError(f"{where}: role {role!r} is unknown: use one of {', '.join(_ROLES)}")
    calls = message.get("tool_calls") or ()
    if calls and role != "assistant":
        raise ChatError(f"{where}: tool_calls in a {role} message; only an assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ChatError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    content = _content_text(message.get("content"), _ROLES[role], where)
    checked = tuple(
        _call(call, f"{where}.tool_calls[{number}]", tool_call_format) for number, call in enumerate(calls)
    )
    return _Turn(_ROLES[role], content, checked, index)


def _content_text(content: Any, role: str, where: str) -> str:
    """Return a message's content as text: parts of text are joined, other results of tools are written as JSON."""
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if isinstance(content, Sequence) and not (role == "ipython" and not content):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
    if role == "ipython" and content is not None:
        return _dump(content, where)
    what = "a part that is not text" if isinstance(content, Sequence) else type(content).__name__
    raise ChatError(f"{where}: content must be text or a list of parts of type 'text', not {what}")


def _call(call: Any, where: str, tool_call_format: str) -> _Call:
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
            raise ChatError(f"{where}: arguments are not JSON ({error})") from error
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ChatError(f"{where}: arguments must be a dict with str keys, not {type(arguments).__name__}")
    if "form" in call:
        raise ChatError(f"{where}: 'form' is now called 'tool_call_format'; rename it")
    own_format = call.get("tool_call_format", tool_call_format)
    if own_format not in TOOL_CALL_FORMATS:
        raise ChatError(
            f"{where}: tool_call_format {own_format!r} is unknown: use one of {', '.join(TOOL_CALL_FORMATS)}"
        )
    return _Call(name, arguments, own_format, "tool_call_format" in call)


def _tools(tools: Sequence[str | Mapping[str, Any]] | None, tool_call_format: str) -> _Tools:
    builtin: list[str] = []
    custom: list[dict[str, Any]] = []
    if isinstance(tools, (str, Mapping)):
        raise ChatError(f"tools must be a list of schemas or names, not {type(tools).__name__}")
    for index, tool in enumerate(tools or ()):
        schema = tool.get("function", tool) if isinstance(tool, Mapping) else {"name": tool}
        name = schema.get("name") if isinstance(schema, Mapping) else None
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise ChatError(f"tools[{index}]: name {name!r} must be letters, digits, '_', '.', '-'")
        if name in builtin or any(name == other["name"] for other in custom):
            raise ChatError(f"tools[{index}]: {name!r} is there twice")
        if isinstance(tool, str) or tool_call_format == "builtin" or name == CODE_INTERPRETER:
            builtin.append(name)
        else:
            custom.append(dict(schema))
    return _Tools(tuple(builtin), tuple(custom))


def _date_text(date: str | datetime.date | None) -> str:
    if date is None:
        return ""
    if isinstance(date, datetime.date):
        return f"{date.day:02d} {_MONTHS[date.month - 1]} {date.year}"
    if not isinstance(date, str) or not date.strip() or "\n" in date:
        raise ChatError(f"date={date!r} must be one line of text such as '23 July 2024', or a datetime.date")
    return date


# Texts the format prescribes


def _system_head(builtin: Sequence[str], date: str) -> str:
    """Environment, builtin tools and dates, which stand before the system message's own text."""
    lines = []
    if builtin:
        lines.append("Environment: ipython")
        listed = [name for name in builtin if name != CODE_INTERPRETER]
        if listed:
            lines.append("Tools: " + ", ".join(listed))
        elif date:
            lines.append("")  # documented so: a blank line where the list of tools would be
    if date:
        lines += ["Cutting Knowledge Date: December 2023", f"Today Date: {date}"]
    return "\n".join(lines)


def _describe(custom: Sequence[dict[str, Any]], tool_call_format: str) -> str:
    """The user message that tells the model its tools."""
    if tool_call_format == "json":
        schemas = [_dump({"type": "function", "function": tool}, "tools", indent=4) + "\n" for tool in custom]
        return JSON_INTRODUCTION + "".join(schemas) + "\n" + JSON_REQUEST
    text = FUNCTION_INTRODUCTION
    for tool in custom:
        description = tool.get("description", "")
        line = {"name": tool["name"], "description": description, "parameters": tool.get("parameters", {})}
        text += f"Use the function '{tool['name']}' to '{description}':\n{_dump(line, 'tools')}\n\n"
    return text + FUNCTION_REQUEST


def call_text(
    name: str, arguments: Mapping[str, Any], tool_call_format: str = "json", where: str = "call"
) -> str:
    """Return a call as a model writes it. Raises `ChatError`, which begins with ``where``, if the format cannot."""
    if tool_call_format == "json":
        return _dump({"type": "function", "name": name, "parameters": arguments}, where)
    if tool_call_format == "function":
        return f"<function={name}>{_dump(arguments, where)}</function>"
    for word in (name, *arguments):
        if not _IDENTIFIER.fullmatch(word):
            raise ChatError(
                f"{where}: {word!r} is no identifier, which the builtin format name.call(key=value) needs"
            )
    pairs = ", ".join(f"{key}={_dump(value, where)}" for key, value in arguments.items())
    return f"{name}.call({pairs})"


def _is_code(call: _Call) -> bool:
    return (
        call.name == CODE_INTERPRETER
        and isinstance(call.arguments.get("code"), str)
        and len(call.arguments) == 1
    )


def _dump(value: Any, where: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}: cannot be written as JSON ({error})") from error


# Putting ids together


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    role_ids, gap_ids = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [tokenizer.start_header_id, *role_ids, tokenizer.end_header_id, *gap_ids]


def _extend(rendered: Rendered, ids: Sequence[int], *, trained: bool) -> None:
    rendered.ids += ids
    rendered.mask += [trained] * len(ids)


def _add_text(rendered: Rendered, tokenizer: Tokenizer, turn: _Turn) -> None:
    """A message that is read, not written: nothing of it is trained."""
    start = len(rendered.ids)
    ids = [*_header(tokenizer, turn.role), *tokenizer.encode(turn.content), tokenizer.eot_id]
    _extend(rendered, ids, trained=False)
    rendered.spans.append(Span(turn.role, start, len(rendered.ids), turn.index))


def _add_assistant(rendered: Rendered, tokenizer: Tokenizer, turn: _Turn, tools: _Tools) -> None:
    """A message of the assistant: content, then calls; trained from after the header to the ending token."""
    start = len(rendered.ids)
    where = f"messages[{turn.index}].tool_calls"
    calls = [_in_format(call, tools) for call in turn.calls]
    tagged = any(
        _is_code(call)
        or call.tool_call_format == "builtin"
        or (call.tool_call_format == "json" and tools.builtin)
        for call in calls
    )
    segments = _segments(calls, where)
    _extend(rendered, _header(tokenizer, "assistant"), trained=False)
    if tagged:
        body = tokenizer.encode(turn.content)
        for segment in segments:
            body += [tokenizer.python_tag_id, *tokenizer.encode(segment)]
        body.append(tokenizer.eom_id)
    else:
        between = "\n" if turn.content and segments else ""
        body = [*tokenizer.encode(turn.content + between + "".join(segments)), tokenizer.eot_id]
    _extend(rendered, body, trained=True)
    rendered.spans.append(Span("assistant", start, len(rendered.ids), turn.index))


def _in_format(call: _Call, tools: _Tools) -> _Call:
    """The call with its form settled: the one it came with, else builtin for a builtin tool, else the dialog's."""
    if call.own_format:
        return call
    return replace(call, tool_call_format="builtin") if call.name in tools.builtin else call


def _segments(calls: Sequence[_Call], where: str) -> list[str]:
    """Texts that each follow a <|python_tag|> of their own where there is one: code alone, other calls together."""
    segments: list[str] = []
    after_call = False
    for call in calls:
        if _is_code(call):
            segments.append(call.arguments["code"])
        elif after_call:
            segments[-1] += "; " + call_text(call.name, call.arguments, call.tool_call_format, where)
        else:
            segments.append(call_text(call.name, call.arguments, call.tool_call_format, where))
        after_call = not _is_code(call)
    return segments
