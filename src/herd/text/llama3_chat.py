"""Llama 3.1's chat format: a dialog becomes token ids and a loss mask, exactly as Meta's code writes it.

Training, chat, serving and evaluation all take their ids from here, so a model is asked in the tokens it was
trained on. A dialog is ``<|begin_of_text|>`` and then, for each message,
``<|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>``. Special tokens are inserted as ids and
contents are encoded as plain text, so nothing that a user writes can end a turn or start one. Header and
content are encoded separately, as in Meta's code, so the header has the same tokens in training and in
generation, whatever follows.

Tool calls have three formats, all documented for Llama 3.1:

========  ==============================================  =============================================
format    how the model learns of its tools               how it calls one
========  ==============================================  =============================================
json      user message with JSON schemas                  ``{"type": …, "name": …, "parameters": {…}}``
builtin   system: ``Environment: ipython``, ``Tools: a``  ``<|python_tag|>name.call(…)<|eom_id|>``
function  user message with schemas and instructions      ``<function=name>{…}</function>``
========  ==============================================  =============================================

A tool that is given as a bare name ("brave_search"), and ``code_interpreter`` in any case, is builtin in
every format. The code interpreter is called by ``<|python_tag|>`` and then just code. ``<|eom_id|>`` ends a
message that waits for a tool in the ipython environment. ``<|eot_id|>`` ends every other message. Nothing is
added to the system message unless it is asked for: ``date`` adds today's date and the knowledge cutoff,
builtin tools add the environment.

A call with a format of its own keeps it, so a history is rendered the way it was generated: whatever
`toolcall.parse` finds in a message can be rendered again.

Source: llama-models ``models/llama3_1/prompt_format.md``, ``models/llama3/chat_format.py`` and
``prompt_templates/``.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ChatError
from ..package_yaml import package_yaml
from .answers import AnswerParser
from .chat_format import Rendered, Tools
from .messages import CODE_INTERPRETER, CheckedMessage, checked_messages, json_text, tool_schema

if TYPE_CHECKING:
    from .ranks_tokenizer import RanksTokenizer

TOOL_CALL_FORMATS = ("json", "builtin", "function")
TOOL_PROMPTS: dict[str, str] = package_yaml(__package__, "tool_prompts.yaml")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip


class Llama3Chat:
    """Llama 3.1's format for a tokenizer with Llama 3's special tokens."""

    name = "llama3"
    supports_tools = True
    tool_call_formats = TOOL_CALL_FORMATS

    def __init__(self, tokenizer: RanksTokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset({tokenizer.eos_id, tokenizer.eom_id, tokenizer.eot_id})

    def parser(self, *, tools: bool | Collection[str] = False) -> AnswerParser:
        """See `ChatFormat.parser`."""
        return AnswerParser(tools=tools)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        tool_call_format: str | None = None,
        generation_prompt: bool = False,
        date: str | datetime.date | None = None,
    ) -> Rendered:
        """Return the token ids and the loss mask of a dialog (see `ChatFormat.render`).

        A call's own ``"tool_call_format"`` overrides the dialog's. With ``generation_prompt`` the result is
        the beginning of what `render` returns for the longer dialog.
        """
        tokenizer = self._tokenizer
        used = _known_format(tool_call_format or TOOL_CALL_FORMATS[0], "tool_call_format")
        turns = _checked_turns(messages)
        builtin, custom = _split_tools(tools, used)
        if custom:
            turns.insert(int(turns[0].role == "system"), CheckedMessage("user", _describe(custom, used)))
        head = _system_head(builtin, _date_text(date))
        if turns[0].role == "system":
            content = "\n\n".join(part for part in (head, turns[0].content) if part)
            turns[0] = replace(turns[0], content=content)
        elif head:
            turns.insert(0, CheckedMessage("system", head))
        rendered = Rendered([tokenizer.bos_id], [False])
        for turn in turns:
            role = _ROLES[turn.role]
            if turn.role == "assistant":
                body = _assistant_body(turn, tokenizer, builtin, used)
            else:
                body = [*tokenizer.encode(turn.content), tokenizer.eot_id]
            trained = turn.role == "assistant"
            rendered.add(role, turn.index, _header(tokenizer, role), body, trained=trained)
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
        return json_text({"type": "function", "name": name, "parameters": arguments}, where)
    if tool_call_format == "function":
        return f"<function={name}>{json_text(arguments, where)}</function>"
    for word in (name, *arguments):
        if not _IDENTIFIER.fullmatch(word):
            raise ChatError(
                f"{where}: {word!r} is not an identifier, which the builtin format name.call(key=value) needs"
            )
    return f"{name}.call({', '.join(f'{key}={json_text(value, where)}' for key, value in arguments.items())})"


def tool_output(*, ok: bool, stdout: str = "", stderr: str = "") -> str:
    """Return the ipython message after code ran: ``completed`` or ``failed``, and what it printed."""
    text = "completed" if ok else "failed"
    for name, printed in (("stdout", stdout), ("stderr", stderr)):
        if printed:
            text += f"\n[{name}]{printed}[/{name}]"
    return text


# Checking the input


def _known_format(name: str, where: str) -> str:
    if name not in TOOL_CALL_FORMATS:
        raise ChatError(f"{where} {name!r} is unknown: use one of {', '.join(TOOL_CALL_FORMATS)}")
    return name


def _checked_turns(messages: Sequence[Mapping[str, Any]]) -> list[CheckedMessage]:
    turns = checked_messages(messages)
    n_open = 0  # results of tools that the last assistant message may still get
    for turn in turns:
        for number, call in enumerate(turn.calls):
            if call.tool_call_format is not None:
                where = f"messages[{turn.index}].tool_calls[{number}]: tool_call_format"
                _known_format(call.tool_call_format, where)
        if turn.role == "system" and turn.index:
            raise ChatError(f"messages[{turn.index}]: the system message must be the first")
        if turn.role == "tool" and n_open == 0:
            raise ChatError(f"messages[{turn.index}]: a tool result without a call before it")
        n_open = n_open - 1 if turn.role == "tool" else len(turn.calls)
    return turns


def _split_tools(tools: Tools | None, tool_call_format: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of builtin tools and the schemas of the others."""
    builtin: list[str] = []
    custom: list[dict[str, Any]] = []
    if isinstance(tools, (str, Mapping)):
        raise ChatError(f"tools must be a list of schemas or names, not {type(tools).__name__}")
    for index, tool in enumerate(tools or ()):
        name, schema = tool_schema(tool, f"tools[{index}]")
        if name in builtin or any(name == other["name"] for other in custom):
            raise ChatError(f"tools[{index}]: {name!r} is there twice")
        if schema is None or tool_call_format == "builtin" or name == CODE_INTERPRETER:
            builtin.append(name)
        else:
            custom.append(schema)
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
        schemas = [
            json_text({"type": "function", "function": tool}, "tools", indent=4) + "\n" for tool in custom
        ]
        return TOOL_PROMPTS["json_introduction"] + "".join(schemas) + "\n" + TOOL_PROMPTS["json_request"]
    text = TOOL_PROMPTS["function_introduction"]
    for tool in custom:
        description = tool.get("description", "")
        line = {"name": tool["name"], "description": description, "parameters": tool.get("parameters", {})}
        text += f"Use the function '{tool['name']}' to '{description}':\n{json_text(line, 'tools')}\n\n"
    return text + TOOL_PROMPTS["function_request"]


# Ids


def _header(tokenizer: RanksTokenizer, role: str) -> list[int]:
    role_ids, gap_ids = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [tokenizer.start_header_id, *role_ids, tokenizer.end_header_id, *gap_ids]


def _assistant_body(
    turn: CheckedMessage, tokenizer: RanksTokenizer, builtin: Sequence[str], tool_call_format: str
) -> list[int]:
    """Return the ids of an assistant's content, calls and ending."""
    where = f"messages[{turn.index}].tool_calls"
    # texts that each follow a <|python_tag|>, if there is one: code alone, calls together
    segments: list[str] = []
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
