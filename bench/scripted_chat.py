"""A chat server without a model, for tests and measurements of the page: it streams what a script says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from herd.serve import pages
from herd.serve.settings import ServeSettings

Item = str | float | dict[str, Any]
Script = Callable[[dict[str, Any]], Iterable[Item]]


class ScriptedChat:
    """The page's own routes with scripted models behind them.

    ``script`` returns the answer to a request body: texts are pieces of content, numbers are pauses in seconds,
    and dictionaries with the key ``chunk`` are merged into the last chunk, with ``error`` end the stream, with
    ``status`` (and ``error``, ``headers``) are the response itself, and others are deltas. ``bodies`` are the
    requests so far. With a ``key``, requests without it get a 401.
    """

    def __init__(self, script: Script, models: Iterable[dict[str, Any]] = ({"id": "tiny"},)) -> None:
        self.script, self.key = script, ""
        self.models = [
            {"object": "model", "max_model_len": 8192, "meta": {"n_params": 134_515_008}} | each
            for each in models
        ]
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI(openapi_url=None)
        self.app.state.settings = ServeSettings()
        self.app.include_router(pages.router)
        self.app.add_api_route("/v1/models", self._models, methods=["GET"])
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)

    def _refusal(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        error = {"message": "the key is wrong", "type": "authentication_error", "code": "invalid_api_key"}
        return JSONResponse({"error": error}, 401)

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        items = list(self.script(body))
        if items and isinstance(items[0], dict) and "status" in items[0]:
            first = items[0]
            return JSONResponse({"error": first["error"]}, first["status"], first.get("headers"))
        return StreamingResponse(_events(items, body), media_type="text/event-stream")

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread, and yield the address."""
        server = uvicorn.Server(
            uvicorn.Config(self.app, port=0, log_level="error", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def _events(items: list[Item], body: dict[str, Any]) -> AsyncIterator[str]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    n_tokens, reason, last = 0, "stop", {}
    prompt = sum(len(str(message)) for message in body["messages"]) // 4
    yield event({"role": "assistant", "content": ""}) + ": ping\n\n"
    for item in items:
        if isinstance(item, float):
            await asyncio.sleep(item)
        elif isinstance(item, str):
            n_tokens += 1
            yield event({"content": item})
        elif "error" in item:
            yield f"data: {json.dumps(item)}\n\n"
            return
        elif "chunk" in item:
            last, reason = item["chunk"], item.get("reason", reason)
        else:
            reason = "tool_calls" if "tool_calls" in item else reason
            n_tokens += 1
            yield event(item)
    yield event({}, reason)
    details = {"cached_tokens": prompt // 2}
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": n_tokens,
        "total_tokens": prompt + n_tokens,
        "prompt_tokens_details": details,
    }
    yield f"data: {json.dumps(head | {'choices': [], 'usage': usage} | last)}\n\ndata: [DONE]\n\n"


def pieces(text: str, size: int = 4) -> list[Item]:
    """Return a text in pieces of ``size`` characters, about as long as tokens are."""
    return [text[start : start + size] for start in range(0, len(text), size)]
