"""Bring the messages of a request into the shape that chat formats render.

Clients send dialogs that chat formats do not take as they are: several system messages, results of tools in
another order than the calls, tools for a checkpoint whose template has no place for them. All of it is mended
here, once for every API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ChatError
from ..text.chat_format import ChatFormat
from ..text.llama3_chat import TOOL_PROMPTS, call_text
from ..text.messages import ROLES, json_text
from .problems import BadRequest, parsed_json
from .tools import OfferedTool, function_call

TEXT_PARTS = ("text", "input_text", "output_text")
PARTS = (*TEXT_PARTS, "refusal", "image_url", "input_image", "image", "input_audio", "file", "input_file")
SYSTEM_ROLES = ("system", "developer")
MEDIA = {"image_url": "url", "input_audio": "data"}
"""Parts of messages that models of other servers read, with the name of what each must have."""
_SHAPED = {"role", "content", "tool_calls", "tool_call_id", "herd_steps"}
"""Fields of a message that are read here."""


@dataclass(frozen=True)
class ShapedDialog:
    """Messages and tools for `ChatFormat.render`, and the format in which the model writes calls."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    call_format: str


def read_messages(
    messages: Sequence[Mapping[str, Any]], warnings: list[str], *, is_upstream: bool = False
) -> list[dict[str, Any]]:
    """Return OpenAI's chat messages with plain text as content, checked one by one.

    System messages at the beginning become one. A later one is shown as the user's, and a warning says so.
    ``is_upstream``: for a model of another server, a content may be a list of parts with `MEDIA`, and fields
    that are not known here stay. Raises `BadRequest`, naming the message, for one that is malformed or has
    what the model cannot read.
    """
    if not messages:
        raise BadRequest("messages is empty: send at least one message", "messages")
    out: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role")
        if role not in ROLES:
            known = "system, developer, user, assistant or tool"
            raise BadRequest(f"{where}.role={str(role)[:40]!r} must be {known}", f"{where}.role")
        content = message.get("content")
        if ROLES[role] == "tool" and not _has_parts(content):
            content = _json_text(content, f"{where}.content")
        shaped: dict[str, Any] = {"role": "system" if role in SYSTEM_ROLES else ROLES[role]}
        if is_upstream:
            more = {name: value for name, value in message.items() if name not in _SHAPED}
            shaped |= {name: value for name, value in more.items() if value is not None}
        if is_upstream and shaped["role"] != "system" and has_media(content):
            shaped["content"] = _parts(content, f"{where}.content")
        else:
            shaped["content"] = text_of(content, f"{where}.content", may_be_empty=role == "assistant")
        if shaped["role"] == "system" and out and out[-1]["role"] == "system":
            out[-1]["content"] += "\n\n" + shaped["content"]
            continue
        if shaped["role"] == "system" and out:
            warnings.append(
                f"{where}=a system message after the beginning is shown to the model as the user's"
            )
            shaped["role"] = "user"
        if steps := message.get("herd_steps"):
            out += _steps(steps, f"{where}.herd_steps")
        if calls := message.get("tool_calls"):
            shaped["tool_calls"] = _calls(calls, f"{where}.tool_calls")
        if role == "tool" and message.get("tool_call_id") is not None:
            shaped["tool_call_id"] = str(message["tool_call_id"])
        if role == "assistant" and isinstance(thought := message.get("reasoning_content"), str) and thought:
            shaped["reasoning_content"] = thought  # for templates that show it to the model again
        out.append(shaped)
    return _in_order_of_calls(out)


def take_prefill(messages: list[dict[str, Any]]) -> str:
    """Remove the assistant's message at the end and return its text, which the answer is to continue."""
    last = messages[-1]
    is_text = last["role"] == "assistant" and not last.get("tool_calls") and isinstance(last["content"], str)
    if len(messages) < 2 or not is_text:
        raise BadRequest("the last message must be the assistant's text, to be continued", "messages")
    return str(messages.pop()["content"])


def has_media(content: Any) -> bool:
    """Return whether a content is a list of parts with a picture or a sound among them."""
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") in MEDIA for part in content
    )


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the parts of a content for another server: text, and `MEDIA` with what is known of them.

    That server would fetch an address. It may reach what the client cannot, so the data must be in the part.
    """
    out: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        place, kind = f"{where}[{number}]", part.get("type") if isinstance(part, Mapping) else None
        if kind not in MEDIA:
            out.append({"type": "text", "text": _part_text(part, place)})
            continue
        about, name = part.get(kind), MEDIA[kind]
        if not isinstance(about, Mapping) or not isinstance(about.get(name), str):
            raise BadRequest(f"{place}.{kind} must be an object with {name!r}", place)
        if name == "url" and not about["url"].startswith("data:"):
            raise BadRequest(f"{place}: addresses are not fetched; send a data: URL", place)
        known = {each: about[each] for each in (name, "detail", "format") if isinstance(about.get(each), str)}
        out.append({"type": kind, kind: known})
    return out


def _has_parts(content: Any) -> bool:
    """Return whether a content is a list of parts in the sense of the API, and not a list of a tool's own."""
    if not content or not isinstance(content, list):
        return False
    return all(isinstance(part, Mapping) and part.get("type") in PARTS for part in content)


def _json_text(content: Any, where: str) -> Any:
    """Return what a tool gave back as JSON if it is an object, a list, a number or a truth value."""
    if content is None or isinstance(content, str):
        return content
    try:
        return json_text(content, where)
    except ChatError as error:
        raise BadRequest(str(error), where) from None


def text_of(content: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Return the text of a content: a string, or a list of parts that are text.

    Raises `BadRequest`, naming the part, for an image, a sound or a file, which the model cannot read.
    """
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be text or a list of parts of text", where)
    return "".join(_part_text(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else part
    if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
        known = "" if kind in TEXT_PARTS else f": a part of type {str(kind)[:40]!r} is not supported"
        raise BadRequest(f"{where}{known}; the model reads text only", where)
    return text


def shape_dialog(
    messages: list[dict[str, Any]], tools: Sequence[OfferedTool], chat: ChatFormat, warnings: list[str]
) -> ShapedDialog:
    """Return the dialog for a chat format.

    A checkpoint whose template has no place for tools gets them in the system message, calls as text, and
    results as messages of the user. A warning says so.
    """
    schemas = [tool.schema for tool in tools] or None
    has_calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if chat.supports_tools or not (schemas or has_calls):
        return ShapedDialog(messages, schemas, (chat.tool_call_formats or ("json",))[0])
    warnings.append(
        "tools=the model's chat template has no place for them, so they are described in the text"
    )
    out = []
    for message in messages:
        calls = [
            call_text(call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        role = "user" if message["role"] == "tool" else message["role"]
        parts = [part for part in (message["content"], "; ".join(calls)) if part]
        out.append({"role": role, "content": "\n".join(parts)})
    if schemas:
        entries = ({"type": "function", "function": schema} for schema in schemas)
        described = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        example = '{"name": function name, "parameters": dictionary of argument name and its value}'
        text = f"{TOOL_PROMPTS['json_introduction']}{described}\nTo call a function, answer only {example}."
        if out[0]["role"] == "system":
            out[0]["content"] += "\n\n" + text
        else:
            out.insert(0, {"role": "system", "content": text})
    return ShapedDialog(out, None, "json")


def server_step(id_: Any, name: str, arguments: Any, result: Any) -> list[dict[str, Any]]:
    """Return the two messages, not checked yet, for a call that the server ran in an earlier answer."""
    return [
        {"role": "assistant", "content": "", "tool_calls": [function_call(id_, name, arguments)]},
        {"role": "tool", "content": "" if result is None else result, "tool_call_id": id_},
    ]


def _steps(steps: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of calls that the server ran in an earlier answer, without unanswered ones."""
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise BadRequest(f"{where} must be a list of objects", where)
    messages: list[dict[str, Any]] = []
    for step in steps:
        if "content" in step:
            call = step.get("id"), step.get("name", ""), step.get("arguments")
            messages += server_step(*call, step["content"])
    return read_messages(messages, []) if messages else []


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant's message with their arguments as an object."""
    if not isinstance(calls, list):
        raise BadRequest(f"{where} must be a list", where)
    out = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{where}[{number}] must have a function with a name", f"{where}[{number}]")
        arguments, place = function.get("arguments") or {}, f"{where}[{number}].function.arguments"
        if isinstance(arguments, str):
            arguments = parsed_json(arguments, place)
        if not isinstance(arguments, dict):
            raise BadRequest(f"{place} must be an object", place)
        shaped = function_call(call.get("id"), function["name"], arguments)
        if not isinstance(shaped["id"], str):
            del shaped["id"]
        out.append(shaped)
    return out


def _in_order_of_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the results of parallel calls into the order of the calls, because some formats have no ids."""
    out: list[dict[str, Any]] = []
    order: dict[str, int] = {}
    for message in messages:
        if message["role"] == "assistant":
            ids = [call.get("id") for call in message.get("tool_calls", ())]
            order = {id_: number for number, id_ in enumerate(ids) if id_ is not None}
        if message["role"] == "tool" and (place := order.get(message.get("tool_call_id", ""))) is not None:
            at = len(out)
            while at and out[at - 1]["role"] == "tool":
                if order.get(out[at - 1].get("tool_call_id", ""), -1) <= place:
                    break
                at -= 1
            out.insert(at, message)
        else:
            out.append(message)
    return out
