"""OpenAI's ``/v1/responses``, without memory: the client sends the whole dialog each time.

An answer is a list of items: reasoning, a message, calls of functions. In a stream each item is announced,
filled, and closed, and the last event has the whole response.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ConfigDict, Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import ForResponses, ForTokenize
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
    ScoredToken,
    ServerCall,
    ServerResult,
)
from .exchange import Exchange, open_exchange
from .forms import response_schema
from .openai_chat import chat_logprobs
from .problems import BadRequest
from .respond import AnswerWriter, json_text, respond
from .tools import (
    BUILTIN,
    NAMESPACE_SEPARATOR,
    PYTHON,
    called_name,
    function_call,
    read_tool_choice,
    read_tools,
)
from .wire import RequestModel, documented

router = APIRouter()
LOGPROBS = "message.output_text.logprobs"
DROPPED_ITEMS = ("reasoning", "compaction")
"""Items that chat formats leave out of a dialog."""

CODE_ITEM, MCP_ITEM = "code_interpreter_call", "mcp_call"
"""Items of calls that ran on this server."""

Item = dict[str, Any]


class InputRequest(RequestModel):
    """The honoured fields of a request to count tokens (`fields.yaml` has the others).

    For a model of another server, ``model_extra`` has ``reasoning``.
    """

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None


class ResponsesRequest(InputRequest):
    """The honoured fields of a request for a response."""

    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None


@router.post("/v1/responses", **documented(ResponsesRequest))
@router.post("/responses", include_in_schema=False)
async def responses(request: Request, principal: ForResponses) -> Response:
    """Answer a dialog."""
    exchange = await open_exchange(request, principal, "responses", ResponsesRequest)
    asked, served = exchange.asked, exchange.served
    has_logprobs = asked.top_logprobs is not None or LOGPROBS in (asked.include or ())
    sampling = asked.model_dump(include={"temperature", "top_p"}) | {
        "max_tokens": asked.max_output_tokens,
        "logprobs": (asked.top_logprobs or 0) if has_logprobs else None,
    }
    call = await run_in_threadpool(_chat_call, exchange, sampling)
    prompt = await served.prepare_chat(call)
    writer = ResponseWriter(served.name, asked)
    return await respond(exchange, [prompt], writer, stream=bool(asked.stream), call=call)


@router.post("/v1/responses/input_tokens", **documented(InputRequest))
async def input_tokens(request: Request, principal: ForTokenize) -> Response:
    """Return the number of tokens of a dialog's prompt."""
    exchange = await open_exchange(request, principal, "input_tokens", InputRequest)
    call = await run_in_threadpool(_chat_call, exchange, {})
    count = len(await exchange.served.encode_chat(call))
    return exchange.json({"object": "response.input_tokens", "input_tokens": count})


def _chat_call(exchange: Exchange[Any], sampling: Mapping[str, Any]) -> ChatCall:
    asked: InputRequest = exchange.asked
    warnings = exchange.warnings
    tools = read_tools(asked.tools, warnings, exchange.offer)
    choice = read_tool_choice(asked.tool_choice, tools, warnings)
    text = asked.text or {}
    if (verbosity := text.get("verbosity")) not in (None, "medium"):
        warnings.append(f"text.verbosity={str(verbosity)[:20]} has no effect: ask for it in the instructions")
    system = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    dialog = read_messages([*system, *read_items(asked.input, warnings)], warnings)
    schema = response_schema(text.get("format"), warnings)
    reasoning = (asked.model_extra or {}).get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, Mapping) else None
    return ChatCall(
        dialog, sampling, tools, choice, asked.parallel_tool_calls is not False, schema, warnings=warnings,
        passed={} if effort is None else {"reasoning_effort": effort},
    )  # fmt: skip


def read_items(items: str | Sequence[Mapping[str, Any]], warnings: list[str]) -> list[dict[str, Any]]:
    """Return the input in the form of chat messages. A call joins the assistant's message before it."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    out: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        where, kind = f"input[{number}]", item.get("type", "message")
        if kind == "message":
            out.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            space = item.get("namespace")
            name = f"{space}{NAMESPACE_SEPARATOR}{item.get('name')}" if space else item.get("name")
            call = function_call(item.get("call_id"), name, item.get("arguments"))
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
            out[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            out.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
        elif kind == CODE_ITEM:
            outputs = item.get("outputs") or ()
            logs = [str(each.get("logs", "")) for each in outputs if isinstance(each, Mapping)]
            out += server_step(item.get("id"), BUILTIN[PYTHON], {"code": item.get("code")}, "\n".join(logs))
        elif kind == MCP_ITEM:
            name = called_name(str(item.get("server_label")), str(item.get("name")))
            failed = item.get("error") or {}
            result = item.get("output") or text_of(
                failed.get("content"), f"{where}.error.content", may_be_empty=True
            )
            out += server_step(item.get("id"), name, item.get("arguments"), result)
        elif kind == "item_reference":
            raise BadRequest(f"{where}: the server stores no items: send the item itself", where)
        elif kind in DROPPED_ITEMS:
            continue
        else:
            warnings.append(f"{where}=an item of type {str(kind)[:40]!r} is not supported, left out")
    if not out:
        raise BadRequest("input is empty: send at least one message", "input")
    return out


class ResponseWriter(AnswerWriter):
    """Writes an answer as a response object, or as the events of one."""

    def __init__(self, model: str, asked: ResponsesRequest) -> None:
        self._model, self._asked, self._created = model, asked, int(time.time())
        self._n_events = 0
        self._output: list[Item] = []  # closed items, and at the end the one that is filled
        self._filling: type[AnswerText | AnswerThought] | None = None
        self._reason = "stop"

    def begin(self, answer: LiveAnswer) -> bytes:
        self._id = answer.id
        response = self._response(answer, "in_progress")
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def event(self, event: AnswerEvent) -> bytes:
        if isinstance(event, AnswerEnd):
            self._reason = event.reason
            return self._close()
        if isinstance(event, AnswerCall):
            return self._close() + self._call(event)
        if isinstance(event, ServerCall):
            return self._close() + self._server_call(event)
        if isinstance(event, ServerResult):
            return self._server_result(event)
        if not event.text and not (isinstance(event, AnswerText) and event.logprobs):
            return b""
        opening = b""
        if self._filling is not type(event):
            opening = self._close() + self._open(type(event))
        part = self._output[-1]["content"][0]
        part["text"] += event.text
        more: dict[str, Any] = {}
        if isinstance(event, AnswerText):
            logprobs = _logprobs(event.logprobs)
            part["logprobs"] += logprobs
            more["logprobs"] = logprobs
        return opening + self._part_event("delta", delta=event.text, **more)

    def end(self, answer: LiveAnswer) -> bytes:
        response = self._response(answer, self._status)
        return self._event(f"response.{self._status}", response=response)

    def error(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        choice = choices[0]
        self._id, self._reason = answer.id, choice.reason
        for part in choice.parts:
            if isinstance(part, ServerResult):
                self._output.append(_server_item(part.call))
            self.event(part)
        self._close()
        if not self._output:
            self._add(AnswerText)["status"] = self._status
        return self._response(answer, self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _open(self, kind: type[AnswerText | AnswerThought]) -> bytes:
        self._filling = kind
        item = self._add(kind)
        announced = item | {"content": [], "status": "in_progress"}
        added = self._event("response.output_item.added", output_index=self._at, item=announced)
        part = item["content"][0]
        return added + self._event("response.content_part.added", **self._ids, content_index=0, part=part)

    def _add(self, kind: type[AnswerText | AnswerThought]) -> Item:
        """Append a message or a reasoning item with one empty part, and return it."""
        item: Item
        part: Item
        if kind is AnswerThought:
            prefix, item = "rs", {"type": "reasoning", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            prefix, item = "msg", {"type": "message", "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item |= {"id": f"{prefix}_{self._id}_{len(self._output)}", "status": "completed", "content": [part]}
        self._output.append(item)
        return item

    def _close(self) -> bytes:
        if self._filling is None:
            return b""
        item = self._output[-1]
        part = item["content"][0]
        more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        done = self._part_event("done", text=part["text"], **more)
        done += self._event("response.content_part.done", **self._ids, content_index=0, part=part)
        self._filling = None
        item["status"] = self._status
        return done + self._event("response.output_item.done", output_index=self._at, item=item)

    def _call(self, call: AnswerCall) -> bytes:
        item = _call_item(call)
        self._output.append(item)
        ids, text, kind = self._ids, call.arguments, "response.function_call_arguments"
        opening = item | {"arguments": "", "status": "in_progress"}
        added = self._event("response.output_item.added", output_index=self._at, item=opening)
        added += self._event(f"{kind}.delta", **ids, delta=text)
        added += self._event(f"{kind}.done", **ids, name=item["name"], arguments=text)
        return added + self._event("response.output_item.done", output_index=self._at, item=item)

    def _server_call(self, call: ServerCall) -> bytes:
        """Announce a call that runs on this server. Its item is closed with the result."""
        item = _server_item(call)
        self._output.append(item)
        ids = self._ids
        added = self._event("response.output_item.added", output_index=self._at, item=item)
        kind = f"response.{item['type']}"
        begun = self._event(f"{kind}.in_progress", **ids)
        if item["type"] == CODE_ITEM:
            begun += self._event(f"{kind}_code.delta", **ids, delta=item["code"])
            begun += self._event(f"{kind}_code.done", **ids, code=item["code"])
            return added + begun + self._event(f"{kind}.interpreting", **ids)
        begun += self._event(f"{kind}_arguments.delta", **ids, delta=call.arguments)
        return added + begun + self._event(f"{kind}_arguments.done", **ids, arguments=call.arguments)

    def _server_result(self, result: ServerResult) -> bytes:
        item = self._output[-1]
        if item["type"] == CODE_ITEM:
            item |= {"outputs": [{"type": "logs", "logs": result.text}], "status": "completed"}
        else:
            item |= {"output": result.text, "status": "completed"}
            if not result.ok:
                content = [{"type": "text", "text": result.text}]
                error = {"type": "mcp_tool_execution_error", "content": content}
                item |= {"output": None, "error": error, "status": "failed"}
        done = self._event(f"response.{item['type']}.{item['status']}", **self._ids)
        return done + self._event("response.output_item.done", output_index=self._at, item=item)

    @property
    def _at(self) -> int:
        """The index of the latest item."""
        return len(self._output) - 1

    @property
    def _ids(self) -> dict[str, Any]:
        """The fields by which events of the latest item refer to it."""
        return {"item_id": self._output[-1]["id"], "output_index": self._at}

    def _part_event(self, what: str, **fields: Any) -> bytes:
        kind = "output_text" if self._filling is AnswerText else "reasoning_text"
        return self._event(f"response.{kind}.{what}", **self._ids, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return f"event: {kind}\ndata: {json_text(data)}\n\n".encode()

    def _response(self, answer: LiveAnswer, status: str) -> dict[str, Any]:
        asked, sampling = self._asked, answer.prompts[0].sampling
        ended = status != "in_progress"
        response = {
            "id": f"resp_{answer.id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._model,
            "output": self._output if ended else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": asked.top_logprobs or 0,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [_echoed(tool) for tool in asked.tools or ()],
            "truncation": "disabled",
            "background": False,
            "service_tier": "default",
            "metadata": asked.metadata or {},
            "user": asked.user,
            "usage": _usage(answer.usage) if ended else None,
        }
        return response | (answer.warned if ended else {})


def _echoed(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool with the fields that clients expect to see in a response."""
    if tool.get("type") == "function":
        return {"parameters": None, "strict": False, **tool}
    if tool.get("type") == "herd":  # which the types of OpenAI's client do not have
        return {"type": "mcp", "server_label": str(tool.get("name"))}
    return {"description": "", **tool} if tool.get("type") == "namespace" else dict(tool)


def _call_item(call: AnswerCall) -> Item:
    item = {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": "completed",
        "call_id": f"call_{call.id}",
        "name": call.tool.name_inside or call.tool.name,
        "arguments": call.arguments,
    }
    return item | ({"namespace": call.tool.namespace} if call.tool.namespace else {})


def _server_item(call: ServerCall) -> Item:
    """Return the item of a call that runs on this server, before it has a result."""
    if call.tool.group == PYTHON:
        return {
            "id": f"ci_{call.id}",
            "type": CODE_ITEM,
            "status": "in_progress",
            "code": str(json.loads(call.arguments).get("code", "")),
            "container_id": "herd",
            "outputs": None,
        }
    return {
        "id": f"mcp_{call.id}",
        "type": MCP_ITEM,
        "status": "in_progress",
        "server_label": call.tool.group,
        "name": call.tool.name_inside or call.tool.name,
        "arguments": call.arguments,
        "output": None,
        "error": None,
    }


def _logprobs(scores: Sequence[ScoredToken]) -> list[Any]:
    return chat_logprobs(scores)["content"] if scores else []


def _usage(usage: AnswerUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
