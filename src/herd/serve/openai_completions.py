"""OpenAI's ``/v1/completions``: continue a text, or token ids; with ``echo`` and ``logprobs``, score a text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from ..engine.constraint import MAX_TEXT, Constraint
from ..engine.request import TokenLogprob
from ..text.tokenizer import StreamDecoder, Tokenizer
from .answer import AnswerEnd, AnswerEvent, AnswerText, Choice, LiveAnswer
from .auth import Principal, require
from .chat import ReadyPrompt, ServedModel, prepare_text
from .errors import ApiError
from .forms import grammar_constraint, response_schema
from .models import use_model
from .problems import BadRequest, openai_error
from .respond import AnswerWriter, openai_usage, respond, sse_data
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
    response_format: dict[str, Any] | None = None
    grammar: str | None = Field(None, max_length=MAX_TEXT)


@router.post("/v1/completions", **documented(CompletionRequest))
@router.post("/completions", include_in_schema=False)
async def completions(
    request: Request, principal: Annotated[Principal, Depends(require("completions"))]
) -> Response:
    """Continue one or more prompts."""
    asked, warnings = await read_request(request, "completions", CompletionRequest)
    served = await use_model(request, principal, asked.model)
    prompts = await run_in_threadpool(_prompts, served, asked, warnings)
    if len(prompts) * (asked.n or 1) > MAX_PROMPTS:
        raise BadRequest(
            f"{len(prompts)} prompts with n={asked.n or 1}: the limit is {MAX_PROMPTS} answers", "prompt"
        )
    writer = CompletionWriter(served, asked, prompts)
    return await respond(
        request, principal, served, prompts, writer, stream=bool(asked.stream), warnings=warnings
    )


def _prompts(served: ServedModel, asked: CompletionRequest, warnings: list[str]) -> list[ReadyPrompt]:
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
    schema = response_schema(asked.response_format, warnings)
    constraint = None if schema is None else Constraint.json_schema(schema)
    if asked.grammar is not None:
        if constraint is not None:
            raise BadRequest("grammar excludes response_format: leave one out", "grammar")
        constraint = grammar_constraint(asked.grammar)
    scores = asked.logprobs if asked.echo else None
    return [prepare_text(served, each, sampling, asked.n or 1, constraint, scores) for each in given]


class CompletionWriter(AnswerWriter):
    """Writes an answer as a text completion, or as its chunks."""

    def __init__(self, served: ServedModel, asked: CompletionRequest, prompts: Sequence[ReadyPrompt]) -> None:
        self._tokenizer, self._includes_usage = served.tokenizer, asked.includes_usage
        self._echo, self._scores = bool(asked.echo), asked.logprobs is not None
        self._created, self._model = int(time.time()), served.name
        self._texts = [
            _ChoiceText(served.tokenizer, prompt, self._scores) for prompt in prompts for _ in range(prompt.n)
        ]

    def begin(self, answer: LiveAnswer) -> bytes:
        """Return nothing: the first chunk has text."""
        self._answer = answer
        self._head = self._frame(answer)
        self._begun: set[int] = set()
        return b""

    def event(self, event: AnswerEvent) -> bytes:
        """Return the chunk of an event. The first of a choice repeats the prompt if that was asked for."""
        index, echoed = event.index, b""
        if self._echo and index not in self._begun:
            self._begun.add(index)
            text, logprobs = self._texts[index].echo(_prompt_logprobs(self._answer, index))
            echoed = self._chunk(index, text, logprobs)
        if isinstance(event, AnswerText):
            return echoed + self._chunk(index, event.text, self._texts[index].logprobs(event.logprobs))
        reason = event.reason if isinstance(event, AnswerEnd) else None
        return echoed + self._chunk(index, "", None, reason)

    def end(self, answer: LiveAnswer) -> bytes:
        """Return the usage if it was asked for, the warnings, and the end of the stream."""
        more: dict[str, Any] = {}
        if self._includes_usage:
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
        out = []
        for choice in choices:
            reader = self._texts[choice.index]
            text, scores = ("", None)
            if self._echo:
                text, scores = reader.echo(_prompt_logprobs(answer, choice.index))
            more = reader.logprobs(choice.logprobs)
            if scores and more:
                scores = {name: scores[name] + more[name] for name in scores}
            out.append(
                {
                    "index": choice.index,
                    "text": text + choice.text,
                    "logprobs": scores or more,
                    "finish_reason": choice.reason,
                }
            )
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

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return sse_data(self._head | {"choices": [choice]})


class _ChoiceText:
    """Follows the position in the text of one choice, which log-probabilities name for each token."""

    def __init__(self, tokenizer: Tokenizer, prompt: ReadyPrompt, scores: bool) -> None:
        self._tokenizer, self._prompt, self._scores = tokenizer, prompt, scores
        self._decoder, self._length = StreamDecoder(tokenizer), 0

    def echo(self, scores: Sequence[TokenLogprob | None]) -> tuple[str, dict[str, list[Any]] | None]:
        """Return the prompt's text, without the token that begins every text, and its log-probabilities."""
        start = len(self._tokenizer.start_ids)
        ids = self._prompt.ids[start if self._prompt.ids[:start] == self._tokenizer.start_ids else 0 :]
        if not self._scores:
            return self._tokenizer.decode(ids), None
        # nothing comes before a first token to predict it
        known: list[TokenLogprob | None] = [None] * max(0, len(ids) - len(scores))
        known += list(scores)[-len(ids) :] if ids else []
        rows = zip(ids, known, strict=True)
        return self._tokenizer.decode(ids), self._columns(rows)

    def logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, list[Any]] | None:
        """Return the log-probabilities of the next tokens of the answer, if they were asked for."""
        return self._columns((each.id, each) for each in scores) if self._scores else None

    def _columns(self, rows: Any) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for id_, score in rows:
            out["tokens"].append(self._name(id_))
            out["token_logprobs"].append(None if score is None else max(score.logprob, -9999.0))
            out["top_logprobs"].append(None if score is None else self._top(score))
            out["text_offset"].append(self._length)
            self._length += len(self._decoder.feed(id_))
        return out

    def _top(self, score: TokenLogprob) -> Mapping[str, float]:
        return {self._name(id_): max(nats, -9999.0) for id_, nats in score.top}

    def _name(self, id_: int) -> str:
        raw = self._tokenizer.token_bytes(id_)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:  # a part of a character, as OpenAI writes it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _prompt_logprobs(answer: LiveAnswer, index: int) -> Sequence[TokenLogprob | None]:
    flat = [generation for group in answer.generations for generation in group]
    return getattr(flat[index], "prompt_logprobs", None) or ()
