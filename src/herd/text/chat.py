"""The one renderer: a dialog becomes token ids and a loss mask, exactly in Llama 3.1's format.

Training, chat, serving and evaluation all take their ids from here, so a model is asked in the tokens it was
trained on. A dialog is ``<|begin_of_text|>`` and then, for each message,
``<|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>``. Special tokens are inserted as ids and
contents are encoded as plain text, so nothing that a user writes can end a turn or start one. Header and
content are encoded separately, as in Meta's code, so the header has the same tokens in training and in
generation, whatever follows.

Tool calls have three formats, all documented for Llama 3.1:

========  =============================================  ====================================================
format    how the model learns of its tools              how it calls one
========  =============================================  ====================================================
json      user message with JSON schemas                 ``{"type": "function", "name": …, "parameters": {…}}``
builtin   system: ``Environment: ipython``, ``Tools: a`` ``<|python_tag|>name.call(query="…")<|eom_id|>``
function  user message with schemas and instructions     ``<function=name>{…}</function>``
========  =============================================  ====================================================

A tool that is given as a bare name ("brave_search"), and ``code_interpreter`` in any case, is builtin in
every format. The code interpreter is called by ``<|python_tag|>`` and then just code. ``<|eom_id|>`` ends a
message that waits for a tool in the ipython environment; ``<|eot_id|>`` ends every other message. Nothing is
added to the system message unless it is asked for: ``date`` adds today's date and the knowledge cutoff,
builtin tools add the environment.

A call with a format of its own keeps it, so a history is rendered the way it was generated: whatever
`toolcall.parse` finds in a message can be rendered again.

Source: llama-models ``models/llama3_1/prompt_format.md``, ``models/llama3/chat_format.py`` and
``prompt_templates/``.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from ..errors import ChatError
from .tokenizer import Tokenizer

TOOL_CALL_FORMATS = ("json", "builtin", "function")
CODE_INTERPRETER = "code_interpreter"
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
TOOL_PROMPTS: dict[str, str] = yaml.safe_load(
    files(__package__).joinpath("tool_prompts.yaml").read_text(encoding="utf-8")
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
          "ipython": "ipython", "tool": "ipython"}  # fmt: skip
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip

Tools = Sequence[str | Mapping[str, Any]]
"""Names of builtin tools, and JSON schemas ``{"name", "description", "parameters"}``, bare or as in OpenAI's
API."""


@dataclass(frozen=True)
class Span:
    """The tokens ``ids[start:end]`` of a message, with its header and ending.

    ``message`` is its index in the dialog, or None for a message that the renderer added (descriptions of
    tools, or a system message with only the environment or date).
    """

    role: str
    start: int
    end: int
    message: int | None


@dataclass
class Rendered:
    """Token ids and a mask, both of length T. The mask is True for what an assistant writes."""

    ids: list[int]
    mask: list[bool]
    spans: list[Span] = field(default_factory=list)

    def add(
        self, role: str, message: int | None, header: list[int], body: list[int], *, trained: bool
    ) -> None:
        """Append a message."""
        start = len(self.ids)
        self.ids += header + body
        self.mask += [False] * len(header) + [trained] * len(body)
        self.spans.append(Span(role, start, len(self.ids), message))


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: dict[str, Any]
    tool_call_format: str | None  # None: that of the dialog

    @property
    def code(self) -> str | None:
        """The program, if it is a call of the code interpreter with nothing else."""
        code = self.arguments.get("code")
        alone = self.name == CODE_INTERPRETER and len(self.arguments) == 1
        return code if alone and isinstance(code, str) else None


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str
    calls: tuple[_Call, ...] = ()
    index: int | None = None


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Tools | None = None,
    tool_call_format: str = "json",
    generation_prompt: bool = False,
    date: str | datetime.date | None = None,
) -> Rendered:
    """Return the token ids and the loss mask of a dialog.

    ``messages``: ``{"role": system|developer|user|assistant|ipython|tool, "content": …}``. A content is text
    or a list of ``{"type": "text", "text": …}``; that of a tool may be any JSON value, and that of an
    assistant may be None. An assistant's message may hold ``"tool_calls": [{"name", "arguments": dict}]``;
    OpenAI's nesting under ``"function"`` is accepted, and a call's own ``"tool_call_format"`` overrides the
    dialog's. ``date``: the text or date for "Today Date". With ``generation_prompt`` the header of the
    assistant's next message is added; the result is then the beginning of what `render` returns for the
    longer dialog.

    Raises `ChatError` for what the format cannot express and `TokenizerError` for text that is not Unicode.
    """
    if tool_call_format not in TOOL_CALL_FORMATS:
        raise ChatError(
            f"tool_call_format={tool_call_format!r} is unknown: use one of {', '.join(TOOL_CALL_FORMATS)}"
        )
    tokenizer.require_chat_format()
    turns = _checked_turns(messages)
    builtin, custom = _split_tools(tools, tool_call_format)
    if custom:
        turns.insert(int(turns[0].role == "system"), _Turn("user", _describe(custom, tool_call_format)))
    head = _system_head(builtin, _date_text(date))
    if turns[0].role == "system":
        own = turns.pop(0)
        turns.insert(
            0, _Turn("system", "\n\n".join(part for part in (head, own.content) if part), (), own.index)
        )
    elif head:
        turns.insert(0, _Turn("system", head))
    rendered = Rendered([tokenizer.bos_id], [False])
    for turn in turns:
        header = _header(tokenizer, turn.role)
        if turn.role == "assistant":
            body = _assistant_body(turn, tokenizer, builtin, tool_call_format)
        else:
            body = [*tokenizer.encode(turn.content), tokenizer.eot_id]
        rendered.add(turn.role, turn.index, header, body, trained=turn.role == "assistant")
    if generation_prompt:
        header = _header(tokenizer, "assistant")
        rendered.ids += header
        rendered.mask += [False] * len(header)
    return rendered


def call_text(
    name: str, arguments: Mapping[str, Any], tool_call_format: str = "json", where: str = "call"
) -> str:
    """Return a call as a model writes it.

    Raises `ChatError`, which begins with ``where``, if the format cannot express it.
    """
    if tool_call_format == "json":
        return _dump({"type": "function", "name": name, "parameters": arguments}, where)
    if tool_call_format == "function":
        return f"<function={name}>{_dump(arguments, where)}</function>"
    for word in (name, *arguments):
        if not _IDENTIFIER.fullmatch(word):
            raise ChatError(
                f"{where}: {word!r} is not an identifier, which the builtin format name.call(key=value) needs"
            )
    return f"{name}.call({', '.join(f'{key}={_dump(value, where)}' for key, value in arguments.items())})"


def tool_output(*, ok: bool, stdout: str = "", stderr: str = "") -> str:
    """Return the ipython message after code ran: ``completed`` or ``failed``, and what it printed."""
    text = "completed" if ok else "failed"
    for name, printed in (("stdout", stdout), ("stderr", stderr)):
        if printed:
            text += f"\n[{name}]{printed}[/{name}]"
    return text


# Checking the input


def _checked_turns(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ChatError("messages is empty: a dialog has at least one message")
    turns = [_checked_turn(message, index) for index, message in enumerate(messages)]
    n_open = 0  # results of tools that the last assistant message may still get
    for turn in turns:
        if turn.role == "system" and turn.index:
            raise ChatError(f"messages[{turn.index}]: the system message must be the first")
        if turn.role == "ipython" and n_open == 0:
            raise ChatError(f"messages[{turn.index}]: a tool result without a call before it")
        n_open = n_open - 1 if turn.role == "ipython" else len(turn.calls)
    return turns


def _checked_turn(message: Mapping[str, Any], index: int) -> _Turn:
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
    checked = tuple(_checked_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls))
    return _Turn(_ROLES[role], content, checked, index)


def _content_text(content: Any, role: str, where: str) -> str:
    """Return a message's content as text: text parts joined, other results of tools as JSON."""
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


def _checked_call(call: Any, where: str) -> _Call:
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
    own = call.get("tool_call_format")
    if own not in (None, *TOOL_CALL_FORMATS):
        raise ChatError(
            f"{where}: tool_call_format {own!r} is unknown: use one of {', '.join(TOOL_CALL_FORMATS)}"
        )
    return _Call(name, arguments, own)


def _split_tools(tools: Tools | None, tool_call_format: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of builtin tools and the schemas of the others."""
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
    return builtin, custom


def _date_text(date: str | datetime.date | None) -> str:
    if date is None:
        return ""
    if isinstance(date, datetime.date):
        return f"{date.day:02d} {_MONTHS[date.month - 1]} {date.year}"
    if not isinstance(date, str) or not date.strip() or "\n" in date:
        raise ChatError(f"date={date!r} must be one line of text such as '23 July 2024', or a datetime.date")
    return date


# Texts that the format prescribes


def _system_head(builtin: Sequence[str], date: str) -> str:
    """Return the lines before the system message's own text: environment, builtin tools and dates."""
    lines = ["Environment: ipython"] if builtin else []
    listed = [name for name in builtin if name != CODE_INTERPRETER]
    if listed:
        lines.append("Tools: " + ", ".join(listed))
    elif builtin and date:
        lines.append("")  # the documentation has a blank line where the list of tools would be
    if date:
        lines += ["Cutting Knowledge Date: December 2023", f"Today Date: {date}"]
    return "\n".join(lines)


def _describe(custom: Sequence[dict[str, Any]], tool_call_format: str) -> str:
    """Return the user message that describes the tools to the model."""
    if tool_call_format == "json":
        schemas = [_dump({"type": "function", "function": tool}, "tools", indent=4) + "\n" for tool in custom]
        return TOOL_PROMPTS["json_introduction"] + "".join(schemas) + "\n" + TOOL_PROMPTS["json_request"]
    text = TOOL_PROMPTS["function_introduction"]
    for tool in custom:
        description = tool.get("description", "")
        line = {"name": tool["name"], "description": description, "parameters": tool.get("parameters", {})}
        text += f"Use the function '{tool['name']}' to '{description}':\n{_dump(line, 'tools')}\n\n"
    return text + TOOL_PROMPTS["function_request"]


def _dump(value: Any, where: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}: cannot be written as JSON ({error})") from error


# Ids


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    role_ids, gap_ids = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [tokenizer.start_header_id, *role_ids, tokenizer.end_header_id, *gap_ids]


def _assistant_body(
    turn: _Turn, tokenizer: Tokenizer, builtin: Sequence[str], tool_call_format: str
) -> list[int]:
    """Return the ids of an assistant's content, calls and ending."""
    where = f"messages[{turn.index}].tool_calls"
    segments: list[
        str
    ] = []  # texts that each follow a <|python_tag|> where there is one: code alone, calls together
    is_tagged = after_call = False
    for call in turn.calls:
        used = call.tool_call_format or ("builtin" if call.name in builtin else tool_call_format)
        text = call.code if call.code is not None else call_text(call.name, call.arguments, used, where)
        if after_call and call.code is None:
            segments[-1] += "; " + text
        else:
            segments.append(text)
        after_call = call.code is None
        is_tagged |= call.code is not None or used == "builtin" or (used == "json" and bool(builtin))
    if not is_tagged:
        between = "\n" if turn.content and segments else ""
        return [*tokenizer.encode(turn.content + between + "".join(segments)), tokenizer.eot_id]
    body = tokenizer.encode(turn.content)
    for segment in segments:
        body += [tokenizer.python_tag_id, *tokenizer.encode(segment)]
    return [*body, tokenizer.eom_id]
