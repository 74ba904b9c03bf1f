"""Run the server until it is told to stop, then let the open answers finish."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import ServeSettings

KEEP_ALIVE_SECONDS = 75
"""Longer than the 60 s of common proxies, so that these close idle connections first."""
GRACE_SECONDS = 5
"""Time after the drain for the last events to reach their clients."""


class _PromptProtocol(HttpToolsProtocol):
    """Keeps nothing of an answer in the process that the kernel has not taken yet.

    uvicorn collects up to 64 kB for a client that reads slowly. If the process dies, the client does not get
    them, but they are billed.
    """

    def connection_made(self, transport: Any) -> None:
        """Set the limit of the buffer to zero. Called by asyncio."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)


class _Flushed:
    """An application whose ``send`` returns once the kernel has taken what was sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)  # uvicorn's object for a request and its response
        flow = getattr(cycle, "flow", None)
        if flow is None:  # the start and the end of the application
            await self._app(scope, receive, send)
            return

        async def send_and_wait(message: Message) -> None:
            await send(message)
            if flow.write_paused:
                await flow.drain()

        await self._app(scope, receive, send_and_wait)


class HerdServer(uvicorn.Server):
    """A server that stops in two steps.

    At the first signal it takes no new requests, and open answers may finish for ``drain_seconds``. The rest
    end with an error event. A second signal ends everything at once. ``when_ready`` is called with the port
    once the server listens.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: ServeSettings,
        port: int,
        when_ready: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                _Flushed(app),
                http=_PromptProtocol,
                host=settings.host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.drain_seconds) + GRACE_SECONDS,
            )
        )
        self._app, self._settings, self._when_ready = app, settings, when_ready

    async def startup(self, sockets: Any = None) -> None:
        """Listen. Called by uvicorn."""
        await super().startup(sockets)
        if self.started and self._when_ready is not None:
            self._when_ready(int(self.servers[0].sockets[0].getsockname()[1]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or stop at once. Called by uvicorn for SIGINT and SIGTERM."""
        if not self._app.state.stopping:
            self._app.state.stopping = True
            close, seconds = self._app.state.models.close, self._settings.drain_seconds
            threading.Thread(target=close, args=(seconds,), name="herd-drain", daemon=True).start()
        super().handle_exit(sig, frame)
