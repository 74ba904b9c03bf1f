"""Embeddings of texts: OpenAI's ``/v1/embeddings``, llama.cpp's ``/embedding`` and Ollama's ``/api/embed``.

The embedding of a text by a model of this process is the mean of its last hidden states, after the last norm,
of length 1: what llama.cpp computes with ``--pooling mean``. The engine computes it like a prompt, among the
other requests, and nothing is generated. Models of other servers have their own ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import ForEmbeddings, ForOllama
from .calls import EmbeddingCall
from .events import Choice
from .exchange import Exchange, open_exchange
from .ollama import OllamaModel, nanoseconds
from .problems import BadRequest
from .respond import WriteBody, respond
from .vectors import vector_text
from .wire import RequestModel, documented

router = APIRouter()
MAX_INPUTS = 2048
"""OpenAI's own limit."""
Input = str | list[str] | list[int] | list[list[int]]


class EmbeddingRequest(RequestModel):
    """The honoured fields of a request to ``/v1/embeddings`` (`fields.yaml` has the others)."""

    model_config = ConfigDict(extra="allow")
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class LlamaCppEmbeddingRequest(RequestModel):
    """The honoured fields of a request to ``/embedding``."""

    content: Input


class OllamaEmbedRequest(OllamaModel):
    """The honoured fields of a request to ``/api/embed``."""

    model: str
    input: str | list[str]
    dimensions: int | None = Field(None, ge=1)


@router.post("/v1/embeddings", **documented(EmbeddingRequest))
@router.post("/embeddings", include_in_schema=False)
async def embeddings(request: Request, principal: ForEmbeddings) -> Response:
    """Return the embeddings of texts, or of token ids, which are taken as they are."""
    exchange = await open_exchange(request, principal, "embeddings", EmbeddingRequest)
    asked = exchange.asked
    write = vector_text if asked.encoding_format == "base64" else list

    def body(choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": choice.index, "embedding": write(choice.vector)}
            for choice in choices
        ]
        n_tokens = answer.usage.prompt_tokens
        out: dict[str, Any] = {"object": "list", "data": data, "model": answer.served.name}
        out["usage"] = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return out | ({"herd": answer.remarks} if answer.remarks else {})

    call = EmbeddingCall(_inputs(asked.input, "input"), "input", asked.dimensions, asked.model_extra or {})
    return await _embed(exchange, call, body)


@router.post("/embedding", **documented(LlamaCppEmbeddingRequest))
async def llamacpp_embedding(request: Request, principal: ForEmbeddings) -> Response:
    """Return the embeddings of texts in llama.cpp's form, in which each has a list of its own."""
    exchange = await open_exchange(request, principal, "llamacpp_embedding", LlamaCppEmbeddingRequest)

    def body(choices: Sequence[Choice], answer: LiveAnswer) -> list[dict[str, Any]]:
        return [{"index": choice.index, "embedding": [list(choice.vector)]} for choice in choices]

    call = EmbeddingCall(_inputs(exchange.asked.content, "content"), "content")
    return await _embed(exchange, call, body)


@router.post("/api/embed", **documented(OllamaEmbedRequest))
async def ollama_embed(request: Request, principal: ForOllama) -> Response:
    """Return the embeddings of texts in Ollama's form."""
    exchange = await open_exchange(request, principal, "ollama_embed", OllamaEmbedRequest)
    asked = exchange.asked

    def body(choices: Sequence[Choice], answer: LiveAnswer) -> dict[str, Any]:
        usage = answer.usage
        return {
            "model": asked.model,
            "embeddings": [list(choice.vector) for choice in choices],
            "total_duration": nanoseconds(usage.total_seconds),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
        } | answer.warned

    call = EmbeddingCall(_inputs(asked.input, "input"), "input", asked.dimensions)
    return await _embed(exchange, call, body)


async def _embed(exchange: Exchange[Any], call: EmbeddingCall, write: WriteBody) -> Response:
    return await respond(exchange, await exchange.served.prepare_embeddings(call), write)


def _inputs(given: Any, param: str) -> list[str | list[int]]:
    """Return the inputs of a request: one text, one list of token ids, or a list of such."""
    inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 0 < len(inputs) <= MAX_INPUTS:
        raise BadRequest(f"{param} has {len(inputs)} texts: send 1 to {MAX_INPUTS}", param)
    return list(inputs)
