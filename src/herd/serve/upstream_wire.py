"""Bodies of requests to another server and chunks of its streams, in the form of OpenAI's API.

Every request asks for a stream, so that what was delivered is known whenever it breaks. The tokens of an
answer are counted like this:

- Servers of vLLM and Herd tell in every chunk how many tokens the choice has so far
  (``stream_options.continuous_usage_stats``), so the count is exact at every moment.
- Of other servers a chunk counts the ids in ``token_ids`` if it has them, or its log-probabilities, or
  otherwise one token if it has any text or call. A piece of text has at least one token, so this never counts
  too many.
- At the end the server's own ``usage`` replaces the count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .calls import ChatCall, TextCall
from .events import AnswerEnd, AnswerEvent, AnswerText, AnswerThought, EndReason, ScoredToken, answer_call
from .forms import ANY_OBJECT
from .problems import BadRequest
from .tools import OfferedTool, function_call

MAX_TOKENS = 2**31 - 1
"""Largest number of tokens that is believed."""
TEMPLATE_BYTES = 1024
"""Allowance in the bound of a prompt for what a chat template writes once, e.g. a system prompt."""
MESSAGE_BYTES = 64
"""Allowance for what a chat template writes around each message."""
BEGINNING = 512
"""Characters or tokens at the beginning of a prompt that choose the upstream which may have it cached."""
BYTES_PER_TOKEN = 4
"""Estimate for the bill of a stream that broke before the upstream told the tokens of the prompt."""
_END_REASONS: Mapping[str, EndReason] = {"length": "length", "tool_calls": "tool_calls"}


def chat_body(call: ChatCall, model: str) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions``, but for what `UpstreamSource` adds."""
    body = {"model": model, "messages": _messages(call), **_settings(call)}
    if (logprobs := call.sampling.get("logprobs")) is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    if call.prefill:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    tools = [] if call.tool_choice.mode == "none" else list(call.tools)
    if names := call.tool_choice.names:
        tools = [tool for tool in tools if tool.name in names]
    if tools:
        body["tools"] = [_tool(tool) for tool in tools]
        body["parallel_tool_calls"] = call.parallel_calls
        if call.tool_choice.mode == "required":
            single = {"type": "function", "function": {"name": tools[0].name}}
            body["tool_choice"] = single if len(tools) == 1 else "required"
        else:
            body["tool_choice"] = "auto"
    return body


def text_body(call: TextCall, model: str) -> dict[str, Any]:
    """Return the body for ``/v1/completions``, but for what `UpstreamSource` adds."""
    body = {"model": model, "prompt": call.prompt, **_settings(call)}
    if (logprobs := call.sampling.get("logprobs")) is not None:
        body["logprobs"] = logprobs
    return body | ({"echo": True} if call.echo else {})


def check_passed(passed: Mapping[str, Any]) -> None:
    """Raise `BadRequest` for settings of a chat template that are not settings: a template, or no text."""
    settings = passed.get("chat_template_kwargs")
    for name in ("chat_template", "tokenize"):
        if isinstance(settings, Mapping) and name in settings:
            where = f"chat_template_kwargs.{name}"
            raise BadRequest(f"{where} is not supported: the checkpoint's own template is used", where)


def embedding_body(inputs: Sequence[str | list[int]], dimensions: int | None, model: str) -> dict[str, Any]:
    """Return the body for ``/v1/embeddings``, but for what `UpstreamSource` adds."""
    body = {"model": model, "input": list(inputs), "encoding_format": "base64"}
    return body if dimensions is None else body | {"dimensions": dimensions}


def stream_options(tells_usage: bool) -> dict[str, Any]:
    """Return the fields of a body that ask for a stream with its usage."""
    options: dict[str, Any] = {"include_usage": True}
    if tells_usage:
        options["continuous_usage_stats"] = True
    return {"stream": True, "stream_options": options}


def tokenize_body(body: Mapping[str, Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for ``/tokenize`` that counts the prompt of a body."""
    names = ("model", "messages", "tools", "prompt", "continue_final_message", "add_generation_prompt")
    out = {name: body[name] for name in names if name in body}
    if "prompt" in body:
        return out | {"add_special_tokens": True}
    return out | {name: passed[name] for name in ("chat_template_kwargs",) if name in passed}


def prompt_size(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return an estimate of the tokens of a body's prompt, and the most that it can have.

    The most: a token for each byte, and what a chat template adds. Token ids are counted. Nobody here knows
    the tokens of pictures and sounds: the estimate leaves them out, and the most is `MAX_TOKENS`.
    """
    if "input" in body:
        sizes = [prompt_size({"prompt": each}) for each in body["input"]]
        return sum(estimate for estimate, _ in sizes), sum(most for _, most in sizes)
    prompt = body.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        return len(prompt), len(prompt) + 1
    if prompt is not None:
        nbytes, added = len(prompt.encode()), 2
    else:
        messages = [
            {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
            if isinstance(message["content"], list)
            else message
            for message in body["messages"]
        ]
        tools = json.dumps(body["tools"], ensure_ascii=False, indent=4) if "tools" in body else ""
        nbytes = len(encoded(messages)) + len(tools.encode("utf-8", "replace"))
        added = MESSAGE_BYTES * len(messages) + TEMPLATE_BYTES
        if messages != body["messages"]:
            return nbytes // BYTES_PER_TOKEN, MAX_TOKENS
    return nbytes // BYTES_PER_TOKEN, nbytes + added


def prompt_beginning(body: Mapping[str, Any]) -> bytes:
    """Return the beginning of a body's prompt: prompts that share one profit from the same cache."""
    prompt = body["input"][0] if "input" in body else body.get("prompt")
    first = prompt[:BEGINNING] if prompt is not None else str(body["messages"][0]["content"])[:BEGINNING]
    return encoded(first)


def encoded(value: Any) -> bytes:
    """Return JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _messages(call: ChatCall) -> list[dict[str, Any]]:
    """Return the messages with the ids that the API wants: a call has one, and its result names it."""
    out: list[dict[str, Any]] = []
    unanswered: list[str] = []
    for message in call.messages:
        shaped = dict(message)
        if calls := message.get("tool_calls"):
            unanswered = [str(each.get("id") or f"call_{len(out)}_{n}") for n, each in enumerate(calls)]
            shaped["tool_calls"] = []
            for id_, each in zip(unanswered, calls, strict=True):
                arguments = json.dumps(each["function"]["arguments"], ensure_ascii=False)
                shaped["tool_calls"].append(function_call(id_, each["function"]["name"], arguments))
        if message["role"] == "tool":
            id_ = message.get("tool_call_id") or (unanswered[0] if unanswered else "call_0")
            unanswered = [each for each in unanswered if each != id_]
            shaped["tool_call_id"] = id_
        out.append(shaped)
    if call.prefill:
        out.append({"role": "assistant", "content": call.prefill})
    return out


def _tool(tool: OfferedTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.schema | ({"strict": True} if tool.strict else {})}


def _settings(call: ChatCall | TextCall) -> dict[str, Any]:
    """Return the settings that the client gave, except ``logprobs``, by the names of the API."""
    given = {name: value for name, value in call.sampling.items() if value is not None and name != "logprobs"}
    if stop := list(given.pop("stop", ())):
        given["stop"] = stop
    if "logit_bias" in given:
        given["logit_bias"] = {str(id_): bias for id_, bias in given["logit_bias"].items()}
    if call.n > 1:
        given["n"] = call.n
    if call.schema == ANY_OBJECT:
        given["response_format"] = {"type": "json_object"}
    elif call.schema is not None:
        named = {"name": "answer", "schema": call.schema, "strict": True}
        given["response_format"] = {"type": "json_schema", "json_schema": named}
    return given


class ChoiceReader:
    """Turns the chunks of one choice of a stream into events. ``tokens`` is the number of tokens so far.

    `feed` returns all events but the end, because the usage comes after it. `finish` returns the end.
    ``warnings`` tell about calls that cannot be read.
    """

    def __init__(self, index: int, tools: Mapping[str, OfferedTool]) -> None:
        self._index, self._tools = index, tools
        self._call: dict[str, Any] | None = None  # the call that is being written
        self._n_calls = 0
        self._reason: str | None = None
        self._stop_string: str | None = None
        self.tokens = 0
        self.warnings: list[str] = []

    @property
    def has_ended(self) -> bool:
        """Whether the choice has its finish reason."""
        return self._reason is not None

    def feed(self, choice: Mapping[str, Any], told_tokens: int | None) -> list[AnswerEvent]:
        """Return the events of a choice of a chunk. ``told_tokens`` is the server's count so far."""
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        scores = _scores(choice.get("logprobs"))
        calls = delta.get("tool_calls") or ()
        if told_tokens is not None:
            self.tokens = max(self.tokens, told_tokens)
        elif choice.get("token_ids"):
            self.tokens += len(choice["token_ids"])
        else:
            self.tokens += len(scores) or int(bool(text or thought or calls))
        events: list[AnswerEvent] = []
        if thought:
            events.append(AnswerThought(self._index, str(thought)))
        if text or scores:
            events.append(AnswerText(self._index, str(text), scores))
        for part in calls:
            events += self._feed_call(part)
        if (reason := choice.get("finish_reason")) is not None:
            self._reason = str(reason)
            stop = choice.get("stop_reason")
            self._stop_string = stop if isinstance(stop, str) else None
        return events

    def finish(self) -> list[AnswerEvent]:
        """Return the last call and the end."""
        events = self._end_call()
        reason = _END_REASONS.get(self._reason or "", "stop")
        if self._n_calls and reason != "length":
            reason = "tool_calls"
        elif reason == "tool_calls":
            reason = "stop"
        return [*events, AnswerEnd(self._index, reason, self._stop_string if reason == "stop" else None)]

    def _feed_call(self, part: Mapping[str, Any]) -> list[AnswerEvent]:
        """Add a part of a call, and return the call before it if this one is new."""
        function = part.get("function") or {}
        events: list[AnswerEvent] = []
        index, id_ = part.get("index", 0), part.get("id")
        if self._call is None or index != self._call["index"] or (id_ and id_ != self._call["id"]):
            events = self._end_call()
            self._call = {"index": index, "id": id_, "name": "", "arguments": ""}
        self._call["name"] += function.get("name") or ""
        self._call["arguments"] += function.get("arguments") or ""
        return events

    def _end_call(self) -> list[AnswerEvent]:
        call, self._call = self._call, None
        if call is None:
            return []
        try:
            arguments = json.loads(call["arguments"] or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("the arguments are not an object")
        except (ValueError, RecursionError) as error:
            self.warnings.append(f"tools=the model wrote a call that cannot be read: {error}"[:300])
            return []
        self._n_calls += 1
        made = call["name"], arguments
        return [answer_call(self._index, self._n_calls - 1, made, self._tools, self.warnings)]


def told_usage(chunk: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the tokens of prompt, cache and answer that a chunk tells, or None if it tells none."""
    usage = chunk.get("usage")
    if not isinstance(usage, Mapping):
        return None
    details = usage.get("prompt_tokens_details") or {}
    prompt, cached, completion = (
        min(max(int(each or 0), 0), MAX_TOKENS)
        for each in (usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens"))
    )
    return prompt, min(cached, prompt), completion


def told_warnings(chunk: Mapping[str, Any]) -> list[str]:
    """Return the warnings that a chunk of another Herd tells."""
    remarks = chunk.get("herd")
    told = remarks.get("warnings") if isinstance(remarks, Mapping) else None
    return [each[:300] for each in told if isinstance(each, str)] if isinstance(told, list) else []


def error_message(body: bytes) -> tuple[str, str | None]:
    """Return the message and code of an error's body, in one of the forms that servers use."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        if isinstance(error, str):
            return error[:2000], None
        message = error.get("message") or error.get("detail") or ""
        code = error.get("code")
        if error.get("param") == "input_tokens":  # a prompt that is too long for vLLM, with 400 as its code
            code = "context_length_exceeded"
        text = message if isinstance(message, str) else json.dumps(message)
        return text[:2000], code if isinstance(code, str) else None
    except (ValueError, AttributeError):
        return "", None


def _scores(logprobs: Any) -> tuple[ScoredToken, ...]:
    """Return the log-probabilities of a choice, in the form of chat completions or of completions."""
    if not logprobs:
        return ()
    if (content := logprobs.get("content")) is not None:
        return tuple(
            ScoredToken(*_scored(each), tuple(_scored(top) for top in each.get("top_logprobs") or ()))
            for each in content
        )
    tokens: Sequence[str] = logprobs.get("tokens") or ()
    tops: Iterable[Any] = logprobs.get("top_logprobs") or [None] * len(tokens)
    rows = zip(tokens, logprobs.get("token_logprobs") or (), tops, strict=True)
    scores = []
    for token, nats, likely in rows:
        top = tuple((token_bytes(name), float(x)) for name, x in (likely or {}).items())
        scores.append(ScoredToken(token_bytes(token), nats, top))
    return tuple(scores)


def _scored(token: Mapping[str, Any]) -> tuple[bytes, float]:
    raw = token.get("bytes")
    text = str(token.get("token", ""))
    return (bytes(raw) if raw is not None else text.encode("utf-8", "replace")), float(token["logprob"])


def token_bytes(name: str) -> bytes:
    """Return the bytes of a token from its name in completions: its text, or ``bytes:\\x…`` for a part."""
    if name.startswith("bytes:\\x"):
        return bytes(int(part, 16) for part in name.removeprefix("bytes:\\x").split("\\x"))
    return name.encode("utf-8", "replace")
