"""Ollama's ``/api/chat``, ``/api/generate``, ``/api/tags``, ``/api/show``, ``/api/ps`` and ``/api/version``.

Streams are lines of JSON. Clients read every line, so nothing can be sent to keep a silent stream alive.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from .. import __version__
from .answer import LiveAnswer
from .auth import ForModels, ForOllama, public
from .calls import ChatCall, TextCall
from .dialog import read_messages
from .errors import ApiError
from .events import (
    AnswerCall,
    AnswerEnd,
    AnswerEvent,
    AnswerThought,
    Choice,
    Paragraphs,
    ServerCall,
    ServerResult,
)
from .exchange import open_exchange
from .forms import ANY_OBJECT, enforceable_schema
from .models import ModelSlot
from .openai_chat import herd_step
from .problems import BadRequest
from .respond import AnswerWriter, json_text, respond
from .tools import read_tools
from .wire import RequestModel, documented

router = APIRouter()
OPTIONS = {
    "num_predict": "max_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "min_p": "min_p", "seed": "seed", "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
}  # fmt: skip
"""Options that work, with the names of `engine.Sampling`."""
SILENT_OPTIONS = ("num_ctx", "num_keep", "num_thread", "num_gpu", "num_batch", "main_gpu", "use_mmap", "numa")
"""Options about the machine, which the operator of the server has decided."""


class OllamaModel(RequestModel):
    """The model that a request names, perhaps with ``:latest`` after it, as Ollama's clients may write."""

    @property
    def model_name(self) -> str | None:
        return self.model and self.model.removesuffix(":latest")


class OllamaRequest(OllamaModel):
    """The fields that both routes have which generate."""

    model: str
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    stream: bool | None = None


class OllamaChatRequest(OllamaRequest):
    """The honoured fields of ``/api/chat`` (`fields.yaml` has the others)."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(OllamaRequest):
    """The honoured fields of ``/api/generate``. With ``raw`` there is no chat format."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


@router.post("/api/chat", **documented(OllamaChatRequest))
async def chat(request: Request, principal: ForOllama) -> Response:
    """Answer a dialog."""
    exchange = await open_exchange(request, principal, "ollama_chat", OllamaChatRequest)
    asked, warnings = exchange.asked, exchange.warnings
    if not asked.messages:
        return _loaded(asked.model, "message", {"role": "assistant", "content": ""})

    def read() -> ChatCall:
        tools = read_tools(asked.tools, warnings, exchange.offer)
        dialog = read_messages([_message(each) for each in asked.messages], warnings)
        sampling = read_options(asked.options, exchange.settings.max_stop, warnings)
        schema = _schema(asked.format, warnings)
        return ChatCall(dialog, sampling, tools, schema=schema, warnings=warnings)

    call = await run_in_threadpool(read)
    prompt = await exchange.served.prepare_chat(call)
    writer = OllamaWriter(asked.model, is_chat=True)
    return await respond(exchange, [prompt], writer, stream=asked.stream is not False, call=call)


@router.post("/api/generate", **documented(GenerateRequest))
async def generate(request: Request, principal: ForOllama) -> Response:
    """Answer one prompt, or continue it."""
    exchange = await open_exchange(request, principal, "ollama_generate", GenerateRequest)
    asked, served, warnings = exchange.asked, exchange.served, exchange.warnings
    if not asked.prompt:
        return _loaded(asked.model, "response", "")
    sampling = read_options(asked.options, exchange.settings.max_stop, warnings)
    schema = await run_in_threadpool(_schema, asked.format, warnings)
    if asked.raw or not served.has_chat:
        prompt = await served.prepare_text(TextCall(asked.prompt, sampling, schema=schema))
    else:
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        dialog = read_messages([*system, {"role": "user", "content": asked.prompt}], warnings)
        call = ChatCall(dialog, sampling, schema=schema, warnings=warnings)
        prompt = await served.prepare_chat(call)
    writer = OllamaWriter(asked.model, is_chat=False)
    return await respond(exchange, [prompt], writer, stream=asked.stream is not False)


@router.get("/api/tags")
async def tags(request: Request, principal: ForModels) -> dict[str, Any]:
    """List the models that the key may use."""
    return {"models": [_listed(slot) for slot in request.app.state.models.visible(principal)]}


@router.get("/api/ps")
async def loaded(request: Request, principal: ForModels) -> dict[str, Any]:
    """List the models that are in memory."""
    loaded = [slot for slot in request.app.state.models.visible(principal) if slot.served is not None]
    return {"models": [_listed(slot) | {"context_length": slot.context} for slot in loaded]}


@router.get("/api/version", dependencies=[Depends(public)])
async def version() -> dict[str, str]:
    """Return the version of the server."""
    return {"version": __version__}


@router.post("/api/show", **documented(OllamaModel))
async def show(request: Request, principal: ForModels) -> dict[str, Any]:
    """Describe a model."""
    served = (await open_exchange(request, principal, "ollama_show", OllamaModel)).served
    return {
        "details": _details(served.facts),
        "model_info": {
            "general.architecture": "llama",
            "llama.context_length": served.context,
            "llama.vocab_size": served.vocab_size,
        },
        "capabilities": ["completion", "tools"] if served.has_chat else ["completion"],
        "modified_at": _time(served.created),
        "template": "",
        "parameters": "",
        "license": str(served.facts.get("licence", "")),
    }


def read_options(options: Mapping[str, Any] | None, max_stop: int, warnings: list[str]) -> dict[str, Any]:
    """Return ``options`` by the names of `engine.Sampling`. Unknown ones are named in ``warnings``."""
    out: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name in OPTIONS and value is not None:
            out[OPTIONS[name]] = value
        elif name == "stop" and value is not None:
            out["stop"] = (value,) if isinstance(value, str) else value
            if not isinstance(out["stop"], tuple | list) or len(out["stop"]) > max_stop:
                raise BadRequest(f"options.stop must be at most {max_stop} strings", "options.stop")
        elif name not in SILENT_OPTIONS:
            warnings.append(f"options.{name[:80]}=unknown option, ignored")
    if isinstance(n := out.get("max_tokens"), int) and n < 0:  # -1 and -2: no limit
        del out["max_tokens"]
    return out


class OllamaWriter(AnswerWriter):
    """Writes an answer as Ollama does, whole or as lines of JSON."""

    media_type = "application/x-ndjson"
    ping = b""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._model, self._is_chat = model, is_chat
        self._reason = "stop"
        self._paragraphs = Paragraphs()

    def event(self, event: AnswerEvent) -> bytes:
        if isinstance(event, AnswerEnd):
            self._reason = event.reason
            return b""
        text = self._paragraphs.text(event)
        if isinstance(event, ServerCall | ServerResult):
            return self._line(self._part("", steps=[event]))
        if isinstance(event, AnswerCall):
            return self._line(self._part("", calls=[event]))
        if not event.text:
            return b""
        return self._line(self._part(text, event.text if isinstance(event, AnswerThought) else ""))

    def end(self, answer: LiveAnswer) -> bytes:
        return self._line(self._part("") | self._end(answer))

    def error(self, error: ApiError) -> bytes:
        return f"{json_text(error_body(error, ''))}\n".encode()

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        choice = choices[0]
        self._reason = choice.reason
        part = self._part(choice.text, choice.thought, choice.calls, choice.results)
        return self._head(done=True) | part | self._end(answer)

    def _line(self, fields: dict[str, Any]) -> bytes:
        return f"{json_text(self._head(done='done_reason' in fields) | fields)}\n".encode()

    def _head(self, *, done: bool) -> dict[str, Any]:
        return {"model": self._model, "created_at": _time(), "done": done}

    def _part(
        self,
        text: str,
        thought: str = "",
        calls: Sequence[AnswerCall] = (),
        steps: Sequence[ServerCall | ServerResult] = (),
    ) -> dict[str, Any]:
        thinking = {"thinking": thought} if thought else {}
        if not self._is_chat:
            return {"response": text} | thinking
        message: dict[str, Any] = {"role": "assistant", "content": text} | thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.tool.name, "arguments": json.loads(call.arguments)}}
                for call in calls
            ]
        if steps:
            message["herd_steps"] = [herd_step(step) for step in steps]
        return {"message": message}

    def _end(self, answer: LiveAnswer) -> dict[str, Any]:
        usage = answer.usage
        first = usage.total_seconds if usage.first_token_seconds is None else usage.first_token_seconds
        fields = {
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": nanoseconds(usage.total_seconds),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(first - usage.queue_seconds),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(usage.total_seconds - first),
        }
        return fields | answer.warned


def error_body(error: ApiError, _: str) -> dict[str, Any]:
    """Return the body of an error as Ollama's API has it."""
    return {"error": error.message}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's form. Ollama's have no ids of calls, and images beside the text."""
    if message.get("images"):
        raise BadRequest("messages: images are not supported; the model reads text only", "messages")
    names = ("role", "content", "tool_calls", "tool_call_id", "herd_steps")
    return {name: message[name] for name in names if message.get(name) is not None}


def _schema(form: str | Mapping[str, Any] | None, warnings: list[str]) -> dict[str, Any] | None:
    if form in (None, ""):
        return None
    if form == "json":
        return ANY_OBJECT
    if isinstance(form, str):
        raise BadRequest(f"format={form[:40]!r} must be json or a JSON schema", "format")
    return enforceable_schema(form, True, "format", warnings)


def _loaded(model: str, field: str, value: Any) -> Response:
    """Answer a request without a prompt, by which clients load a model."""
    head = {"model": model, "created_at": _time(), "done": True, "done_reason": "load"}
    return JSONResponse(head | {field: value})


def _listed(slot: ModelSlot) -> dict[str, Any]:
    return {
        "name": slot.name,
        "model": slot.name,
        "modified_at": _time(slot.created),
        "size": int(slot.facts.get("size", slot.nbytes)),
        "digest": hashlib.sha256(slot.name.encode()).hexdigest(),
        "details": _details(slot.facts),
    }


def _details(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": str(facts.get("n_params", "")),
        "quantization_level": str(facts.get("quantization", "")),
    }


def _time(seconds: int | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def nanoseconds(seconds: float) -> int:
    """Return a duration as Ollama's API writes it."""
    return max(0, round(seconds * 1e9))
