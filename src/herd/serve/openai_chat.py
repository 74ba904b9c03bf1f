"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import ForChat
from .calls import ChatCall
from .chunks import ChunkWriter
from .dialog import read_messages, take_prefill
from .events import (
    AnswerCall,
    AnswerEnd,
    AnswerEvent,
    AnswerText,
    AnswerThought,
    Choice,
    Paragraphs,
    ScoredToken,
    ServerCall,
    ServerResult,
    stop_fields,
)
from .exchange import Exchange, open_exchange
from .forms import read_forms
from .problems import BadRequest
from .respond import respond
from .tools import function_call, read_tool_choice, read_tools
from .wire import CompletionFields, StreamOptions, documented

router = APIRouter()


class ChatRequest(CompletionFields):
    """The honoured fields of a request (`fields.yaml` has the others)."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None


@router.post("/v1/chat/completions", **documented(ChatRequest))
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(request: Request, principal: ForChat) -> Response:
    """Answer a dialog."""
    exchange = await open_exchange(request, principal, "chat", ChatRequest)
    asked, served = exchange.asked, exchange.served
    call = await run_in_threadpool(_chat_call, exchange)
    prompt = await served.prepare_chat(call)
    writer = ChatWriter(served.name, asked.stream_options)
    return await respond(exchange, [prompt], writer, stream=bool(asked.stream), call=call)


@router.post("/v1/chat/completions/input_tokens", **documented(ChatRequest))
@router.post("/chat/completions/input_tokens", include_in_schema=False)
async def count_input_tokens(request: Request, principal: ForChat) -> Response:
    """Count the tokens of a request without answering it."""
    exchange = await open_exchange(request, principal, "chat", ChatRequest)
    call = await run_in_threadpool(_chat_call, exchange)
    count = len(await exchange.served.encode_chat(call))
    return exchange.json({"object": "chat.completion.input_tokens", "input_tokens": count})


def _chat_call(exchange: Exchange[ChatRequest]) -> ChatCall:
    asked, warnings, is_upstream = exchange.asked, exchange.warnings, exchange.served.is_upstream
    tools = read_tools(asked.tools, warnings, exchange.offer)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    limits = {asked.max_tokens, asked.max_completion_tokens}
    if None not in limits and len(limits) > 1:
        warnings.append("max_tokens=max_completion_tokens is used instead")
    sampling = asked.sampling() | {
        "max_tokens": asked.max_completion_tokens or asked.max_tokens,
        "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
    }
    messages = read_messages(asked.messages, warnings, is_upstream=is_upstream)
    prefill = ""
    if asked.continue_final_message:
        if asked.add_generation_prompt:
            raise BadRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        prefill = take_prefill(messages)
    elif asked.add_generation_prompt is False:
        raise BadRequest(
            "add_generation_prompt: false needs continue_final_message: true", "add_generation_prompt"
        )
    choice = read_tool_choice(asked.tool_choice, tools, warnings)
    schema, grammar = (asked.json_schema, None) if is_upstream else read_forms(asked.forms, warnings)
    return ChatCall(
        messages, sampling, tools, choice, asked.parallel_tool_calls is not False, schema, asked.n or 1,
        warnings, prefill=prefill, grammar=grammar, cache_salt=asked.cache_salt or "", passed=asked.passed,
    )  # fmt: skip


class ChatWriter(ChunkWriter):
    """Writes an answer as a chat completion, or as its chunks."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, options: StreamOptions | None) -> None:
        super().__init__(model, options)
        self._paragraphs = Paragraphs()

    def begin(self, answer: LiveAnswer) -> bytes:
        """Return one chunk with the role for every choice."""
        n_choices = sum(prompt.n for prompt in answer.prompts)
        role = {"role": "assistant", "content": None}
        return super().begin(answer) + b"".join(self._delta(index, role) for index in range(n_choices))

    def event(self, event: AnswerEvent) -> bytes:
        """Return the chunks of an event. The arguments of a call come in a chunk of their own."""
        index = event.index
        if isinstance(event, AnswerText):
            logprobs = chat_logprobs(event.logprobs) if event.logprobs else None
            return self._delta(index, {"content": self._paragraphs.text(event)}, logprobs=logprobs)
        if isinstance(event, AnswerThought):
            return self._delta(index, {"reasoning_content": event.text})
        if isinstance(event, AnswerEnd):
            return self._delta(index, {}, reason=event.reason, **stop_fields(event))
        if isinstance(event, ServerCall | ServerResult):
            self._paragraphs.text(event)
            return self._delta(index, {"herd_steps": [herd_step(event)]})
        whole = _call(event) | {"index": event.number}
        opening = whole | {"function": {"name": event.tool.name, "arguments": ""}}
        rest = {"index": event.number, "function": {"arguments": event.arguments}}
        return self._delta(index, {"tool_calls": [opening]}) + self._delta(index, {"tool_calls": [rest]})

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        """Return a chat completion."""
        return self._whole([self._choice(choice, answer) for choice in choices], answer)

    def _choice(self, choice: Choice, answer: LiveAnswer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.thought:
            message["reasoning_content"] = choice.thought
        if choice.results:
            message["herd_steps"] = [herd_step(result) for result in choice.results]
        if choice.calls:
            message["tool_calls"] = [_call(call) for call in choice.calls]
            message["content"] = choice.text or None
        has_logprobs = answer.prompts[0].sampling.logprobs is not None
        return {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(choice.logprobs) if has_logprobs else None,
            "finish_reason": choice.reason,
            **stop_fields(choice),
        }

    def _frame(self, answer: LiveAnswer, kind: str) -> dict[str, Any]:
        return super()._frame(answer, kind) | {"service_tier": "default"}

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: Any = None,
        reason: str | None = None,
        **more: str,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk(choice | more)


def chat_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any]:
    """Return log-probabilities as chat completions have them: text and bytes of each token."""

    def token(raw: bytes, nats: float | None) -> dict[str, Any]:
        logprob = max(nats or 0.0, -9999.0)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        token(each.raw, each.logprob) | {"top_logprobs": [token(*pair) for pair in each.top]}
        for each in scores
    ]
    return {"content": content, "refusal": None}


def herd_step(event: ServerCall | ServerResult) -> dict[str, Any]:
    """Return a call that this server runs, with its result if any, as an entry of ``herd_steps``."""
    call = event if isinstance(event, ServerCall) else event.call
    step = {"id": f"call_{call.id}", "name": call.tool.name, "arguments": call.arguments}
    return step if isinstance(event, ServerCall) else step | {"content": event.text, "ok": event.ok}


def _call(call: AnswerCall) -> dict[str, Any]:
    return function_call(f"call_{call.id}", call.tool.name, call.arguments)
