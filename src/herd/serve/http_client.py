"""The HTTP client of a gateway: aiohttp's, without what a gateway must not do.

It follows no redirects, keeps no cookies, uses no proxies of the environment and decompresses nothing. It
sends the headers that it is given, the type of a body, and its length.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from yarl import URL

IDLE_SECONDS = 3.0
"""How long a connection is kept for the next request. Servers close idle ones after 5 s or more."""
REST_SECONDS = 0.2
"""How long the rest of a response is waited for that nobody wants to read, to keep the connection."""
MAX_UNREAD = 1 << 18
"""Bytes of a body that are kept for a slow reader before the connection is read no more."""


class HttpError(Exception):
    """A response that broke off or is not HTTP."""


class ConnectError(HttpError):
    """A server that cannot be reached."""


class _Connector(aiohttp.TCPConnector):
    """Connections to servers. One on which a server has sent something unasked is not used again.

    aiohttp would read that as the answer to the next request, which may be another client's.
    """

    async def connect(self, *args: Any, **more: Any) -> Any:
        """Return a connection for a request. Called by aiohttp."""
        while True:
            connection = await super().connect(*args, **more)
            if connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()


class HttpClient:
    """Connections to servers, one for each open request. Its methods belong to one event loop.

    ``headers`` are sent with every request.
    """

    def __init__(self, headers: Mapping[str, str], connect_seconds: float) -> None:
        self._headers, self._connect_seconds = headers, connect_seconds
        self._opened: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def exchange(
        self, url: str, path: str, body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send JSON (or GET without a ``body``) to a path below a URL. The block gets the response.

        Raises `HttpError`, also for a response that breaks off in the block. The connection is closed if the
        block raises before the end of the response.
        """
        try:
            response = await self._request(URL(url + path, encoded=True), body)
            try:
                if response.status < 200:
                    raise HttpError(f"the server wants another protocol: {response.status}")
                yield response
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if response.content.at_eof() else REST_SECONDS):
                        async for _ in response.content.iter_any():
                            pass
            finally:
                response.close()  # does nothing after the end of the response
        except aiohttp.ConnectionTimeoutError:
            raise ConnectError(f"no connection within {self._connect_seconds:g} s") from None
        except aiohttp.ClientConnectorError as error:  # also what is wrong with a certificate
            raise ConnectError(str(error)) from None
        except aiohttp.ClientError as error:
            raise HttpError(f"the response broke off or is not HTTP: {error}") from None

    async def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()

    async def _request(self, url: URL, body: bytes | None) -> aiohttp.ClientResponse:
        """Send a request, and again if the server has closed a connection that was idle, as it may."""
        options: dict[str, Any] = {"method": "GET"}
        if body is not None:
            options = {"method": "POST", "data": body, "headers": {"content-type": "application/json"}}
        while True:
            reused: list[bool] = []
            try:
                return await self._session.request(
                    url=url, allow_redirects=False, trace_request_ctx=reused, **options
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if not reused or isinstance(error, aiohttp.ClientConnectorError):
                    raise

    @property
    def _session(self) -> aiohttp.ClientSession:
        """aiohttp's session, which is made in the event loop to which it belongs."""
        if self._opened is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_note_reuse)
            self._opened = aiohttp.ClientSession(
                connector=_Connector(limit=0, keepalive_timeout=IDLE_SECONDS),
                headers=self._headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_seconds),
                read_bufsize=MAX_UNREAD,
                trace_configs=[trace],
            )
        return self._opened


async def _note_reuse(_: Any, context: Any, __: Any) -> None:
    context.trace_request_ctx.append(True)
