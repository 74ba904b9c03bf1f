"""OpenAI's ``/v1/completions``: continue text or token ids, or score them (``echo`` and ``logprobs``)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import ForCompletions
from .calls import TextCall
from .chunks import ChunkWriter
from .events import AnswerEnd, AnswerEvent, AnswerText, Choice, ScoredToken, stop_fields
from .exchange import Exchange, open_exchange
from .forms import read_forms
from .problems import BadRequest
from .respond import respond
from .wire import CompletionFields, documented

router = APIRouter()
MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default."""


class CompletionRequest(CompletionFields):
    """The honoured fields of a request (`fields.yaml` has the others)."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


@router.post("/v1/completions", **documented(CompletionRequest))
@router.post("/completions", include_in_schema=False)
async def completions(request: Request, principal: ForCompletions) -> Response:
    """Continue one or more prompts."""
    exchange = await open_exchange(request, principal, "completions", CompletionRequest)
    asked, served = exchange.asked, exchange.served
    calls = await run_in_threadpool(_text_calls, exchange)
    if len(calls) * (asked.n or 1) > MAX_PROMPTS:
        raise BadRequest(
            f"{len(calls)} prompts with n={asked.n or 1}: the limit is {MAX_PROMPTS} answers", "prompt"
        )
    prompts = [await served.prepare_text(call) for call in calls]
    writer = CompletionWriter(served.name, asked)
    return await respond(exchange, prompts, writer, stream=bool(asked.stream))


def _text_calls(exchange: Exchange[CompletionRequest]) -> list[TextCall]:
    asked = exchange.asked
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
    is_upstream, salt = exchange.served.is_upstream, asked.cache_salt or ""
    schema, grammar = (asked.json_schema, None) if is_upstream else read_forms(asked.forms, exchange.warnings)
    more = schema, grammar, bool(asked.echo), salt, asked.passed
    return [TextCall(each, sampling, asked.n or 1, *more) for each in given]


class CompletionWriter(ChunkWriter):
    """Writes an answer as a text completion, or as its chunks. The first chunk has text."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, asked: CompletionRequest) -> None:
        super().__init__(model, asked.stream_options)
        self._columns: dict[int, _LogprobColumns] | None = None if asked.logprobs is None else {}

    def event(self, event: AnswerEvent) -> bytes:
        """Return the chunk of an event."""
        if isinstance(event, AnswerText):
            logprobs = self._logprobs(event.index, event.logprobs)
            return self._chunk(_choice(event.index, event.text, logprobs))
        if isinstance(event, AnswerEnd):
            return self._chunk(_choice(event.index, "", None, event.reason) | stop_fields(event))
        return b""

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        """Return a text completion."""
        out = []
        for each in choices:
            logprobs = self._logprobs(each.index, each.logprobs)
            out.append(_choice(each.index, each.text, logprobs, each.reason) | stop_fields(each))
        return self._whole(out, answer)

    def _logprobs(self, index: int, scores: Sequence[ScoredToken]) -> dict[str, list[Any]] | None:
        """Return the log-probabilities of the next tokens of a choice, if they were requested."""
        if self._columns is None:
            return None
        return self._columns.setdefault(index, _LogprobColumns()).add(scores)


def _choice(index: int, text: str, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class _LogprobColumns:
    """Writes log-probabilities of one choice with the position of each token in the text, in characters."""

    def __init__(self) -> None:
        self._decoder, self._length = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def add(self, scores: Sequence[ScoredToken]) -> dict[str, list[Any]]:
        """Return the columns of the next tokens."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        out: dict[str, list[Any]] = {name: [] for name in names}
        for each in scores:
            top = {_name(raw): max(nats, -9999.0) for raw, nats in each.top}
            out["tokens"].append(_name(each.raw))
            out["token_logprobs"].append(None if each.logprob is None else max(each.logprob, -9999.0))
            out["top_logprobs"].append(None if each.logprob is None else top)
            out["text_offset"].append(self._length)
            self._length += len(self._decoder.decode(each.raw))
        return out


def _name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character, as OpenAI writes it
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
