"""Run the server until it is told to stop, then let the open answers finish."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from .settings import ServeSettings

KEEP_ALIVE_SECONDS = 75
"""Longer than the 60 s of common proxies, so that these close idle connections first."""
GRACE_SECONDS = 5
"""Time after the drain for the last events to reach their clients."""


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
                app,
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
            close, seconds = self._app.state.served.loop.close, self._settings.drain_seconds
            threading.Thread(target=close, args=(seconds,), name="herd-drain", daemon=True).start()
        super().handle_exit(sig, frame)
