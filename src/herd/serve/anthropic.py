"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``.

Requests are translated into OpenAI's messages, which `dialog.py` reads. An answer is a series of blocks:
text, reasoning ("thinking") and calls of tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import ForMessages, ForTokenize
from .calls import ChatCall
from .dialog import read_messages, server_step, text_of
from .errors import ApiError
from .events import (
    AnswerCall,
    AnswerEnd,
    AnswerEvent,
    AnswerText,
    AnswerThought,
    AnswerUsage,
    Choice,
    ServerCall,
    ServerResult,
)
from .exchange import Exchange, open_exchange
from .forms import response_schema
from .problems import BadRequest
from .respond import AnswerWriter, json_text, respond
from .tools import OfferedTool, ToolChoice, called_name, function_call, read_tool_choice, read_tools
from .wire import RequestModel, StopStrings, documented

router = APIRouter()
BILLING_BLOCK = "x-anthropic-billing-header:"
"""Beginning of a block of Claude Code's that differs in each request and would prevent prefix caching."""
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
REDACTED = "redacted_thinking"
"""Reasoning of earlier answers that only Anthropic can read. It is left out."""


class CountRequest(RequestModel):
    """The honoured fields of a request to count tokens (`fields.yaml` has the others)."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """The honoured fields of a request for a message."""

    max_tokens: int = Field(ge=1)
    stop_sequences: StopStrings = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)


@router.post("/v1/messages", **documented(MessagesRequest))
async def messages(request: Request, principal: ForMessages) -> Response:
    """Answer a dialog."""
    exchange = await open_exchange(request, principal, "messages", MessagesRequest)
    asked, served = exchange.asked, exchange.served
    sampling = asked.model_dump(include={"max_tokens", "temperature", "top_p", "top_k"})
    sampling["stop"] = tuple(asked.stop_sequences or ())
    call = await run_in_threadpool(_chat_call, exchange, sampling)
    prompt = await served.prepare_chat(call)
    writer = MessageWriter(served.name)
    return await respond(exchange, [prompt], writer, stream=bool(asked.stream), call=call)


@router.post("/v1/messages/count_tokens", **documented(CountRequest))
async def count_tokens(request: Request, principal: ForTokenize) -> Response:
    """Return the number of tokens of a dialog's prompt."""
    exchange = await open_exchange(request, principal, "count_tokens", CountRequest)
    call = await run_in_threadpool(_chat_call, exchange, {})
    return exchange.json({"input_tokens": len(await exchange.served.encode_chat(call))})


def _chat_call(exchange: Exchange[Any], sampling: Mapping[str, Any]) -> ChatCall:
    asked: CountRequest = exchange.asked
    warnings = exchange.warnings
    tools = read_tools(list(_openai_tools(asked.tools or ())), warnings, exchange.offer)
    choice, parallel = _tool_choice(asked.tool_choice, tools, warnings)
    system = [{"role": "system", "content": text} for text in _system_texts(asked.system)]
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(asked.messages):
        turns += _turns(message, f"messages[{number}]")
    if turns and turns[-1]["role"] == "assistant":
        raise BadRequest(
            "the last message is the assistant's, which a client cannot begin: end with a user's message",
            "messages",
        )
    output = asked.output_config or {}
    if output.get("effort") is not None:
        warnings.append("output_config.effort=the model has no adjustable reasoning effort")
    schema = response_schema(output.get("format"), warnings)
    dialog = read_messages([*system, *turns], warnings)
    return ChatCall(dialog, sampling, tools, choice, parallel, schema, warnings=warnings)


def _system_texts(system: str | Sequence[Mapping[str, Any]] | None) -> list[str]:
    blocks = [system] if isinstance(system, str) else system or []
    texts = [
        block if isinstance(block, str) else text_of([block], f"system[{number}]")
        for number, block in enumerate(blocks)
    ]
    return [text for text in texts if text and not text.startswith(BILLING_BLOCK)]


def _turns(message: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Yield a message in OpenAI's form: results of tools become messages of their own, before the text."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(
            f"{where}.role={str(role)[:40]!r} must be user, assistant or system", f"{where}.role"
        )
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content must be text or a list of blocks", f"{where}.content")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    has_results = False
    ran: dict[Any, Mapping[str, Any]] = {}
    for number, block in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result" and role == "user":
            has_results = True
            yield _tool_result(block, place)
        elif kind == "tool_use" and role == "assistant":
            calls.append(function_call(block.get("id"), block.get("name"), block.get("input")))
        elif kind == "mcp_tool_use" and role == "assistant":
            ran[block.get("id")] = block
        elif kind == "mcp_tool_result" and role == "assistant":
            if texts:
                yield {"role": role, "content": "\n\n".join(texts)}
                texts = []
            call = ran.get(block.get("tool_use_id"), {})
            name = called_name(str(call.get("server_name")), str(call.get("name")))
            result = text_of(block.get("content"), f"{place}.content", may_be_empty=True)
            yield from server_step(block.get("tool_use_id"), name, call.get("input"), result)
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind not in ("thinking", REDACTED):
            texts.append(text_of([block], f"{where}.content"))
    if texts or calls or not has_results:
        turn: dict[str, Any] = {"role": role, "content": "\n\n".join(texts)}
        if thoughts:
            turn["reasoning_content"] = "\n\n".join(thoughts)
        yield turn | ({"tool_calls": calls} if calls else {})


def _tool_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = text_of(block.get("content"), f"{where}.content", may_be_empty=True)
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": block.get("tool_use_id")}


def _openai_tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield tools in OpenAI's form. Functions are Anthropic's custom tools."""
    for number, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            yield dict(tool)
            continue
        if not isinstance(tool.get("input_schema"), Mapping):
            where = f"tools[{number}].input_schema"
            raise BadRequest(f"{where} must be a JSON schema", where)
        yield {**tool, "type": "function", "parameters": tool["input_schema"]}


def _tool_choice(
    choice: Mapping[str, Any] | None, tools: Sequence[OfferedTool], warnings: list[str]
) -> tuple[ToolChoice, bool]:
    """Return the tool choice, and whether several calls are allowed."""
    if choice is None:
        return ToolChoice(), True
    named = {"type": "function", "name": choice.get("name")}
    openai = {"auto": "auto", "any": "required", "tool": named, "none": "none"}.get(str(choice.get("type")))
    if openai is None:
        kind = str(choice.get("type"))[:40]
        raise BadRequest(f"tool_choice.type={kind!r} must be auto, any, tool or none", "tool_choice")
    parallel = choice.get("disable_parallel_tool_use") is not True
    return read_tool_choice(openai, tools, warnings), parallel


class MessageWriter(AnswerWriter):
    """Writes an answer as a message, or as the events of one."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._number = -1  # of the latest block
        self._open: type[AnswerText | AnswerThought] | None = None  # the kind of the block that is not closed
        self._reason = "end_turn"
        self._stop_string: str | None = None

    def begin(self, answer: LiveAnswer) -> bytes:
        return _event("message_start", message=self._message(answer, [], None, None))

    def event(self, event: AnswerEvent) -> bytes:
        if isinstance(event, AnswerEnd):
            self._reason, self._stop_string = _stop(event.reason, event.stop_string)
            return self._close()
        if isinstance(event, AnswerCall | ServerCall):
            use = _tool_use(event) if isinstance(event, AnswerCall) else _server_use(event)
            opening = self._start(use | {"input": {}})
            delta = {"type": "input_json_delta", "partial_json": event.arguments}
            return opening + self._delta(delta) + _event("content_block_stop", index=self._number)
        if isinstance(event, ServerResult):
            return self._start(_server_result(event)) + _event("content_block_stop", index=self._number)
        if not event.text:
            return b""
        if isinstance(event, AnswerThought):
            block, delta = _thinking(""), {"type": "thinking_delta", "thinking": event.text}
        else:
            block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": event.text}
        opening = b""
        if self._open is not type(event):
            opening = self._start(block)
            self._open = type(event)
        return opening + self._delta(delta)

    def end(self, answer: LiveAnswer) -> bytes:
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop_string}
        last = _event("message_delta", delta=delta, usage=_usage(answer.usage), **answer.warned)
        return last + _event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return _event("error", error=_error(error))

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        choice = choices[0]
        content = [block for part in choice.parts for block in _blocks(part)]
        return self._message(answer, content, *_stop(choice.reason, choice.stop_string)) | answer.warned

    def _message(
        self, answer: LiveAnswer, content: list[Any], reason: str | None, stop: str | None
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{answer.id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": _usage(answer.usage) | {"service_tier": "standard"},
        }

    def _start(self, block: dict[str, Any]) -> bytes:
        closing = self._close()
        self._number += 1
        return closing + _event("content_block_start", index=self._number, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._number, delta=delta)

    def _close(self) -> bytes:
        is_open, self._open = self._open is not None, None
        return _event("content_block_stop", index=self._number) if is_open else b""


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the body of an error as Anthropic's API has it."""
    return {"type": "error", "error": _error(error), "request_id": request_id}


def _error(error: ApiError) -> dict[str, Any]:
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    return {"type": ERROR_TYPES.get(error.status, default), "message": error.message}


def _stop(reason: str, stop_string: str | None) -> tuple[str, str | None]:
    return ("stop_sequence" if reason == "stop" and stop_string else STOP_REASONS[reason]), stop_string


def _usage(usage: AnswerUsage) -> dict[str, Any]:
    """Return the usage. Anthropic's input tokens do not include those read from the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _blocks(part: AnswerEvent) -> list[dict[str, Any]]:
    """Return the blocks of a part of a whole answer."""
    if isinstance(part, AnswerCall):
        return [_tool_use(part)]
    if isinstance(part, ServerResult):
        return [_server_use(part.call), _server_result(part)]
    if isinstance(part, AnswerThought):
        return [_thinking(part.text)]
    return [{"type": "text", "text": part.text}] if isinstance(part, AnswerText) and part.text else []


def _server_use(call: ServerCall) -> dict[str, Any]:
    """Return a call that runs on this server, as Anthropic has calls of MCP servers."""
    return {
        "type": "mcp_tool_use",
        "id": f"mcptoolu_{call.id}",
        "name": call.tool.name_inside or call.tool.name,
        "server_name": call.tool.group,
        "input": json.loads(call.arguments),
    }


def _server_result(result: ServerResult) -> dict[str, Any]:
    return {
        "type": "mcp_tool_result",
        "tool_use_id": f"mcptoolu_{result.call.id}",
        "is_error": not result.ok,
        "content": [{"type": "text", "text": result.text}],
    }


def _tool_use(call: AnswerCall) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"toolu_{call.id}",
        "name": call.tool.name,
        "input": json.loads(call.arguments),
    }


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json_text({'type': kind, **fields})}\n\n".encode()
