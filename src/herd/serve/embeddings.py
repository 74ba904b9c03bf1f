"""Embeddings of texts: OpenAI's ``/v1/embeddings``, llama.cpp's ``/embedding`` and Ollama's ``/api/embed``.

The embedding of a text by a model of this process is the mean of its last hidden states, after the last norm,
of length 1: what llama.cpp computes with ``--pooling mean``. The engine computes it like a prompt, among the
other requests, and nothing is generated. Models of other servers have their own ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from .answer import LiveAnswer
from .auth import Principal, require
from .calls import EmbeddingCall
from .events import Choice
from .models import use_model
from .ollama import nanoseconds, plain_name
from .problems import BadRequest
from .respond import BodyWriter, respond
from .vectors import vector_text
from .wire import RequestModel, documented, read_request

router = APIRouter()
MAX_INPUTS = 2048
"""OpenAI's own limit."""
Input = str | list[str] | list[int] | list[list[int]]
Write = Callable[[list[Sequence[float]], LiveAnswer], Any]
"""How an API writes the embeddings of an answer."""


class EmbeddingRequest(RequestModel):
    """The honoured fields of a request to ``/v1/embeddings`` (`fields.yaml` has the others)."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class LlamaCppEmbeddingRequest(RequestModel):
    """The honoured fields of a request to ``/embedding``."""

    model: str | None = None
    content: Input


class OllamaEmbedRequest(RequestModel):
    """The honoured fields of a request to ``/api/embed``."""

    model: str
    input: str | list[str]
    dimensions: int | None = Field(None, ge=1)


@router.post("/v1/embeddings", **documented(EmbeddingRequest))
@router.post("/embeddings", include_in_schema=False)
async def embeddings(
    request: Request, principal: Annotated[Principal, Depends(require("embeddings"))]
) -> Response:
    """Return the embeddings of texts, or of token ids, which are taken as they are."""
    asked, warnings = await read_request(request, "embeddings", EmbeddingRequest)
    write = vector_text if asked.encoding_format == "base64" else list

    def body(vectors: list[Sequence[float]], answer: LiveAnswer) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": write(vector)}
            for index, vector in enumerate(vectors)
        ]
        n_tokens = answer.usage.prompt_tokens
        out: dict[str, Any] = {"object": "list", "data": data, "model": answer.served.name}
        out["usage"] = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return out | ({"herd": answer.remarks} if answer.remarks else {})

    call = EmbeddingCall(_inputs(asked.input, "input"), "input", asked.dimensions, asked.model_extra or {})
    return await _embed(request, principal, asked.model, call, warnings, body)


@router.post("/embedding", **documented(LlamaCppEmbeddingRequest))
async def llamacpp_embedding(
    request: Request, principal: Annotated[Principal, Depends(require("embeddings"))]
) -> Response:
    """Return the embeddings of texts in llama.cpp's form, in which each has a list of its own."""
    asked, warnings = await read_request(request, "llamacpp_embedding", LlamaCppEmbeddingRequest)

    def body(vectors: list[Sequence[float]], answer: LiveAnswer) -> list[dict[str, Any]]:
        return [{"index": index, "embedding": [list(vector)]} for index, vector in enumerate(vectors)]

    call = EmbeddingCall(_inputs(asked.content, "content"), "content")
    return await _embed(request, principal, asked.model, call, warnings, body)


@router.post("/api/embed", **documented(OllamaEmbedRequest))
async def ollama_embed(
    request: Request, principal: Annotated[Principal, Depends(require("ollama"))]
) -> Response:
    """Return the embeddings of texts in Ollama's form."""
    asked, warnings = await read_request(request, "ollama_embed", OllamaEmbedRequest)

    def body(vectors: list[Sequence[float]], answer: LiveAnswer) -> dict[str, Any]:
        usage = answer.usage
        return {
            "model": asked.model,
            "embeddings": [list(vector) for vector in vectors],
            "total_duration": nanoseconds(usage.total_seconds),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
        } | ({"herd": {"warnings": answer.warnings}} if answer.warnings else {})

    call = EmbeddingCall(_inputs(asked.input, "input"), "input", asked.dimensions)
    return await _embed(request, principal, plain_name(asked.model), call, warnings, body)


async def _embed(
    request: Request,
    principal: Principal,
    model: str | None,
    call: EmbeddingCall,
    warnings: list[str],
    write: Write,
) -> Response:
    served = await use_model(request, principal, model)
    prompts = await served.prepare_embeddings(call)
    writer = _VectorWriter(write)
    return await respond(request, principal, served, prompts, writer, stream=False, warnings=warnings)


class _VectorWriter(BodyWriter):
    def __init__(self, write: Write) -> None:
        self._write = write

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> Any:
        return self._write([choice.vector for choice in choices], answer)


def _inputs(given: Any, param: str) -> list[str | list[int]]:
    """Return the inputs of a request: one text, one list of token ids, or a list of such."""
    inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 0 < len(inputs) <= MAX_INPUTS:
        raise BadRequest(f"{param} has {len(inputs)} texts: send 1 to {MAX_INPUTS}", param)
    return list(inputs)
