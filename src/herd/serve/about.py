"""What a server says about itself: its model, its health, and its tokenizer."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from .auth import ForModels, ForTokenize, public
from .calls import ChatCall
from .dialog import read_messages
from .errors import NotFound
from .exchange import Exchange, open_exchange
from .models import ModelPool, ModelSlot
from .problems import BadRequest
from .server_tools import describe_tools
from .tools import read_tools
from .wire import RequestModel, documented

router = APIRouter()


class TokenizeRequest(RequestModel):
    """A text (``content`` or ``prompt``) or a dialog (``messages``) to encode."""

    content: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(RequestModel):
    """Token ids to decode."""

    tokens: list[int]


@router.head("/", dependencies=[Depends(public)])
async def is_there() -> Response:
    """Say that a server is here, as some clients ask before they begin."""
    return Response()


@router.get("/health", dependencies=[Depends(public)])
@router.get("/v1/health", dependencies=[Depends(public)], include_in_schema=False)
async def health() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok"}


@router.get("/readyz", dependencies=[Depends(public)])
async def readyz(request: Request) -> Response:
    """Say whether new requests are taken: 503 while the server stops."""
    ready = not request.app.state.stopping
    return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(request: Request, principal: ForModels) -> dict[str, Any]:
    """List the models that the key may use."""
    pool: ModelPool = request.app.state.models
    slots = pool.visible(principal)
    adapters = [_model(slot, adapter) for slot in slots for adapter in sorted(slot.adapters)]
    return {"object": "list", "data": [*(_model(slot) for slot in slots), *adapters]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str, principal: ForModels) -> dict[str, Any]:
    """Describe a model."""
    pool: ModelPool = request.app.state.models
    if (slot := pool.find(name)) not in pool.visible(principal):
        raise NotFound(f"the model {name[:80]!r} does not exist")
    return _model(slot, name if name in slot.adapters else None)


@router.get("/herd/v1/tools")
async def server_tools(request: Request, principal: ForModels) -> dict[str, Any]:
    """List the tools on this server that the key may use."""
    return {"tools": describe_tools(request.app.state.tools.granted_to(principal))}


@router.post("/tokenize", **documented(TokenizeRequest))
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(request: Request, principal: ForTokenize) -> Response:
    """Return the token ids of a text or of a dialog."""
    exchange = await open_exchange(request, principal, "tokenize", TokenizeRequest)
    tokens: list[Any] = await _ids(exchange)
    if exchange.asked.with_pieces:
        rows = zip(tokens, await exchange.served.token_bytes(tokens), strict=True)
        tokens = [{"id": id_, "piece": _piece(raw)} for id_, raw in rows]
    context = exchange.served.context
    return exchange.json({"tokens": tokens, "count": len(tokens), "max_model_len": context})


@router.post("/detokenize", **documented(DetokenizeRequest))
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(request: Request, principal: ForTokenize) -> Response:
    """Return the text of token ids, as ``content`` (llama.cpp's name) and as ``prompt`` (vLLM's)."""
    exchange = await open_exchange(request, principal, "detokenize", DetokenizeRequest)
    text = await exchange.served.decode(exchange.asked.tokens)
    return exchange.json({"content": text, "prompt": text})


async def _ids(exchange: Exchange[TokenizeRequest]) -> list[int]:
    asked, served, warnings = exchange.asked, exchange.served, exchange.warnings
    texts = [text for text in (asked.content, asked.prompt) if text is not None]
    if len(texts) + (asked.messages is not None) != 1:
        raise BadRequest("send one of content, prompt and messages", "content")
    if asked.messages is not None:
        tools = read_tools(asked.tools, warnings, exchange.offer)
        call = ChatCall(read_messages(asked.messages, warnings), tools=tools, warnings=warnings)
        return await served.encode_chat(call)
    bos = asked.add_special or asked.add_special_tokens or False
    return await served.encode(texts[0], bos=bos, special=bool(asked.parse_special))


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)


def _model(slot: ModelSlot, adapter: str | None = None) -> dict[str, Any]:
    """Describe a model, or one of its adapters, whose ``parent`` it is.

    Clients read the context as ``max_model_len`` (vLLM's name) or ``meta.n_ctx``.
    """
    return {
        "id": adapter or slot.name,
        "parent": slot.name if adapter else None,
        "object": "model",
        "created": slot.created or int(time.time()),
        "owned_by": "herd",
        "aliases": [] if adapter else sorted(slot.aliases),
        "loaded": slot.served is not None,
        "max_model_len": slot.context,
        "context_length": slot.context,
        "meta": {"n_ctx": slot.context, **slot.facts},
    }
