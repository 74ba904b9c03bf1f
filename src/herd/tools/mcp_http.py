"""The connection to an MCP server at an address (Streamable HTTP). Imported only if there is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx2
from mcp.client._transport import TransportStreams
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from ..errors import ToolError

BODY_BYTES = 32 << 20
"""Most that a server may send as one JSON response. Events of a stream are limited by the package `mcp`."""


@asynccontextmanager
async def http_transport(url: str, headers: Mapping[str, str]) -> AsyncIterator[TransportStreams]:
    """Connect to an address without following redirects, so ``headers`` go to this server only."""
    async with create_mcp_http_client(dict(headers)) as client:
        client.event_hooks = {"response": [_limit_body]}
        async with streamable_http_client(url, http_client=client) as streams:
            yield streams


async def _limit_body(response: httpx2.Response) -> None:
    """Let a JSON response be read up to a limit only."""
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _LimitedStream(response.stream)


class _LimitedStream(httpx2.AsyncByteStream):
    """A stream that fails after `BODY_BYTES`."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        n_bytes = 0
        async for chunk in self._stream:
            n_bytes += len(chunk)
            if n_bytes > BODY_BYTES:
                raise ToolError(f"it sent more than {BODY_BYTES >> 20} MB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
