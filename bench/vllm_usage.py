"""Middleware for vLLM's server: it notes the usage that vLLM tells at the end of each complete stream.

`serve_sdk.py` copies this file to a folder of its own, from where vLLM imports it. Notes go beside it: one JSON object
a line.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

NOTES = Path(__file__).with_name("usage.jsonl")


class NotedUsage:
    """An ASGI application around another one."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sent = bytearray()

        async def send_and_keep(message: dict[str, Any]) -> None:
            sent.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_and_keep)
        *_, last, done, _ = sent.decode().split("\n\n") if sent.endswith(b"data: [DONE]\n\n") else [""] * 3
        if done:
            with NOTES.open("a") as notes:
                notes.write(last.removeprefix("data: ") + "\n")
