"""The HTTP application: the APIs before one engine, with everything that holds for all of them.

An API is a module with a ``router``, listed in `_APIS`, and rows in `fields.yaml`.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from . import (
    about,
    admin,
    anthropic,
    embeddings,
    llamacpp,
    ollama,
    openai_chat,
    openai_completions,
    openai_responses,
    pages,
)
from .auth import Authenticator, all_routes, ip_address, refuse_unscoped
from .errors import ApiError, Forbidden, NotFound
from .fields import field_table
from .ledger import Ledger, Unmetered
from .metrics import ServerMetrics
from .models import ModelPool, ModelSlot
from .problems import BadRequest, api_error, error_headers, openai_error
from .server_tools import ServerTools
from .settings import ServeSettings
from .source import Servable
from .store import Store

if TYPE_CHECKING:  # only a gateway needs an HTTP client
    from .upstream_model import UpstreamModels

log = logging.getLogger("herd.serve")

_APIS: tuple[Any, ...] = (
    openai_chat,
    openai_completions,
    openai_responses,
    anthropic,
    ollama,
    llamacpp,
    embeddings,
    about,
    admin,
    pages,
)
_ERROR_BODIES = {"/v1/messages": anthropic.error_body, "/api/": ollama.error_body}
"""How APIs that are not OpenAI's write errors, by the beginning of their paths."""


def create_app(
    served: Servable[Any] | ModelPool,
    store: Store | None,
    settings: ServeSettings,
    tools: ServerTools | None = None,
    upstreams: UpstreamModels | None = None,
) -> FastAPI:
    """Return the application that serves models of this process and of other servers.

    Without a store, everybody may use it, and nobody is billed. ``tools`` are those that this server runs.
    Whoever made them closes them.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if isinstance(app.state.ledger, Ledger) and (count := app.state.ledger.recover()):
            log.info("%d requests of a server that died are settled now", count)
        if upstreams is not None:
            await upstreams.start(app.state.models)
        await run_in_threadpool(field_table)  # read here, with what threads import: no request waits for it
        yield
        if upstreams is not None:
            await upstreams.stop()
        app.state.authenticator.close()
        app.state.ledger.close()

    app = FastAPI(
        title="Herd", version=__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False
    )
    if not isinstance(served, ModelPool):
        served = ModelPool([ModelSlot.of(served)])
    app.state.models, app.state.settings, app.state.store = served, settings, store
    app.state.authenticator = Authenticator(store)
    app.state.ledger = Unmetered() if store is None else Ledger(store)
    app.state.stopping = False
    app.state.tools = tools or ServerTools()
    for api in _APIS:
        app.include_router(api.router)
    routes = list(all_routes(app.routes))
    refuse_unscoped(routes)
    paths = [route.path for route in routes]
    app.state.metrics = ServerMetrics(served.stats, lambda: [slot.name for slot in served.slots], paths)
    for kind in (ApiError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _on_error)
    if settings.allowed_origins:  # keys come in headers, so no page needs a browser's stored credentials
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-herd-warnings", "retry-after", "x-should-retry"],
        )
    app.add_middleware(_Gate, settings=settings)
    return app


class _Gate:
    """Checks host and origin of every request before any route, gives the request a name, and logs its end.

    A Host header must name this server, or a web page of an attacker whose name resolves to this machine
    could use it (DNS rebinding). A browser sends Origin with requests of other sites: these are refused, but
    for the sites that the operator allows. Their Host header must be right, too.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        start, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if (problem := self._problem(Headers(scope=scope))) is not None:
                raise problem
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            await _response(Request(scope), api_error(error))(scope, receive, send_with_id)
        finally:
            for slot in scope["state"].get("pinned", ()):
                scope["app"].state.models.release(slot)
            if log.isEnabledFor(logging.INFO):
                log.info(_line(scope, status, time.monotonic() - start))

    def _problem(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if not host_is_allowed(host, self._settings):
            name = host.encode("ascii", "replace").decode()[:80]
            return BadRequest(
                f"the Host header {name!r} is not a name of this server: allow it with --allow-host",
                status=421,
            )
        known = not origin or origin in self._settings.allowed_origins
        if not known and origin.partition("://")[2] != host:
            name = origin.encode("ascii", "replace").decode()[:80]
            return Forbidden(
                f"web pages of {name} are not allowed: start the server with --allow-origin {name}"
            )
        return None


def _line(scope: Scope, status: int, seconds: float) -> str:
    """Return the line of the log about a request that ended. It has no text of the client."""
    state, route = scope["state"], getattr(scope.get("route"), "path", "-")
    parts = [state["request_id"], f"{scope['method']} {route}", str(status or "left")]
    parts += [f"{name}={json.dumps(state[name])}" for name in ("key", "model") if name in state]
    if "ended" in state:
        how, usage = state["ended"]
        first = usage.first_token_seconds
        parts += [f"{how} prompt={usage.prompt_tokens} cached={usage.cached_tokens}"]
        parts += [f"completion={usage.completion_tokens} first={'-' if first is None else f'{first:.3f}s'}"]
    return " ".join([*parts, f"total={seconds:.3f}s"])


def host_is_allowed(host: str, settings: ServeSettings) -> bool:
    """Return whether a Host header names this server: an IP address, localhost, or an allowed name."""
    if "*" in settings.allowed_hosts:
        return True
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    known = ("localhost", settings.host, *settings.allowed_hosts)
    return name.lower() in (each.lower() for each in known) or ip_address(name) is not None


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        is_unknown = error.status_code == 404
        text = "there is nothing at this address" if is_unknown else str(error.detail)
        error = NotFound(text) if is_unknown else BadRequest(text, status=error.status_code)
    elif isinstance(error, RequestValidationError):
        error = BadRequest("the address of the request is malformed")
    return _response(request, api_error(error))


def _response(request: Request, error: ApiError) -> Response:
    """Return the response for an error, in the form of the API whose path was asked for."""
    request.app.state.metrics.refused(error.code or error.type)
    path = request.scope.get("path", "")
    render = next((body for start, body in _ERROR_BODIES.items() if path.startswith(start)), None)
    body = openai_error(error) if render is None else render(error, request.scope["state"]["request_id"])
    return JSONResponse(body, error.status, error_headers(error))
