"""OpenAI's ``/v1/completions``: continue text or token ids, or score them (``echo`` and ``logprobs``)."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import Principal, require
from .calls import TextCall
from .errors import ApiError
from .events import AnswerEnd, AnswerEvent, AnswerText, Choice, ScoredToken, stop_fields
from .forms import read_forms
from .models import use_model
from .problems import BadRequest, openai_error
from .respond import AnswerWriter, openai_usage, respond, sse_data, usage_so_far
from .wire import SamplingFields, documented, read_request

router = APIRouter()
MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default."""


class CompletionRequest(SamplingFields):
    """The honoured fields of a request (`fields.yaml` has the others)."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


@router.post("/v1/completions", **documented(CompletionRequest))
@router.post("/completions", include_in_schema=False)
async def completions(
    request: Request, principal: Annotated[Principal, Depends(require("completions"))]
) -> Response:
    """Continue one or more prompts."""
    asked, warnings = await read_request(request, "completions", CompletionRequest)
    served = await use_model(request, principal, asked.model)
    calls = await run_in_threadpool(_text_calls, asked, warnings, served.is_upstream)
    if len(calls) * (asked.n or 1) > MAX_PROMPTS:
        raise BadRequest(
            f"{len(calls)} prompts with n={asked.n or 1}: the limit is {MAX_PROMPTS} answers", "prompt"
        )
    prompts = [await served.prepare_text(call) for call in calls]
    writer = CompletionWriter(served.name, asked)
    return await respond(
        request, principal, served, prompts, writer, stream=bool(asked.stream), warnings=warnings
    )


def _text_calls(asked: CompletionRequest, warnings: list[str], is_upstream: bool) -> list[TextCall]:
    given: Any = asked.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise BadRequest("prompt is empty: send a text or a list of texts", "prompt")
    if len(given) > MAX_PROMPTS:
        raise BadRequest(f"prompt has {len(given)} texts, the limit is {MAX_PROMPTS}", "prompt")
    sampling = asked.sampling() | {
        "max_tokens": asked.max_tokens or DEFAULT_MAX_TOKENS,
        "logprobs": asked.logprobs,
    }
    if is_upstream:
        more: dict[str, Any] = {"cache_salt": asked.cache_salt or "", "passed": asked.passed}
        schema, echo = asked.json_schema, bool(asked.echo)
        return [TextCall(each, sampling, asked.n or 1, schema, echo=echo, **more) for each in given]
    schema, grammar = read_forms(asked.forms, warnings)
    return [
        TextCall(each, sampling, asked.n or 1, schema, grammar, bool(asked.echo), asked.cache_salt or "")
        for each in given
    ]


class CompletionWriter(AnswerWriter):
    """Writes an answer as a text completion, or as its chunks."""

    def __init__(self, model: str, asked: CompletionRequest) -> None:
        self._model, self._asked = model, asked
        self._columns: dict[int, _LogprobColumns] | None = None if asked.logprobs is None else {}
        self._created = int(time.time())

    def begin(self, answer: LiveAnswer) -> bytes:
        """Return nothing: the first chunk has text."""
        self._head, self._answer = self._frame(answer), answer
        return b""

    def event(self, event: AnswerEvent) -> bytes:
        """Return the chunk of an event."""
        if isinstance(event, AnswerText):
            return self._chunk(event.index, event.text, self._logprobs(event.index, event.logprobs))
        if isinstance(event, AnswerEnd):
            return self._chunk(event.index, "", None, event.reason, **stop_fields(event))
        return self._chunk(event.index, "", None, None)

    def end(self, answer: LiveAnswer) -> bytes:
        """Return the usage if it was asked for, the warnings, and the end of the stream."""
        more: dict[str, Any] = {}
        if self._asked.includes_usage:
            more = {"usage": openai_usage(answer.usage), "timings": answer.usage.timings}
        if answer.warnings:
            more["herd"] = {"warnings": answer.warnings}
        last = sse_data(self._head | {"choices": []} | more) if more else b""
        return last + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        """Return an error as OpenAI's clients read it from a stream."""
        return sse_data(openai_error(error))

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        """Return a text completion."""
        out = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": self._logprobs(choice.index, choice.logprobs),
                "finish_reason": choice.reason,
                **stop_fields(choice),
            }
            for choice in choices
        ]
        body = self._frame(answer) | {"choices": out, "usage": openai_usage(answer.usage)}
        body["timings"] = answer.usage.timings
        return body | ({"herd": {"warnings": answer.warnings}} if answer.warnings else {})

    def _frame(self, answer: LiveAnswer) -> dict[str, Any]:
        return {
            "id": f"cmpl-{answer.id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": answer.served.fingerprint,
        }

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None = None, **more: str) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **more}
        usage = {"usage": usage_so_far(self._answer, index)} if self._asked.tells_usage else {}
        return sse_data(self._head | {"choices": [choice]} | usage)

    def _logprobs(self, index: int, scores: Sequence[ScoredToken]) -> dict[str, list[Any]] | None:
        """Return the log-probabilities of the next tokens of a choice, if they were requested."""
        if self._columns is None:
            return None
        return self._columns.setdefault(index, _LogprobColumns()).add(scores)


class _LogprobColumns:
    """Writes log-probabilities of one choice with the position of each token in the text, in characters."""

    def __init__(self) -> None:
        self._decoder, self._length = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def add(self, scores: Sequence[ScoredToken]) -> dict[str, list[Any]]:
        """Return the columns of the next tokens."""
        out: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for each in scores:
            known = each.logprob is not None
            out["tokens"].append(_name(each.raw))
            out["token_logprobs"].append(None if each.logprob is None else max(each.logprob, -9999.0))
            out["top_logprobs"].append(
                {_name(raw): max(nats, -9999.0) for raw, nats in each.top} if known else None
            )
            out["text_offset"].append(self._length)
            self._length += len(self._decoder.decode(each.raw))
        return out


def _name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character, as OpenAI writes it
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
