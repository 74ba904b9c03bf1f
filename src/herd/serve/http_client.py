"""A small HTTP/1.1 client for a gateway, which adds little time to answers that are streamed.

It follows no redirects, keeps no cookies, uses no proxies and decompresses nothing. It sends the headers that
it is given, the type of a body, and its length. httptools parses the responses, as it does the requests for
uvicorn. httpx needs 0.9 ms more for a small request.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools

IDLE_SECONDS = 3.0
"""How long a connection is kept for the next request. Servers close idle ones after 5 s or more."""
REST_SECONDS = 0.2
"""How long the rest of a response is waited for that nobody wants to read, to keep the connection."""
MAX_IDLE = 256
"""Connections to one server that are kept."""
MAX_HEAD = 1 << 16
"""Bytes of the status line and headers of a response after which no more of them are read."""
MAX_UNREAD = 1 << 18
"""Bytes of a body that are kept for a slow reader before the connection is read no more."""


class HttpError(Exception):
    """A response that broke off or is not HTTP."""


class ConnectError(HttpError):
    """A server that cannot be reached."""


class HttpConnection(asyncio.Protocol):
    """A connection and the response that is read from it: ``status``, ``headers``, then the body in `chunks`.

    Names of headers are in lower case.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._changed = asyncio.Event()
        self._failure: HttpError | None = None
        self._has_ended = True
        self._can_be_reused = True
        self._is_paused = False
        self.idle_since = 0.0

    @property
    def is_reusable(self) -> bool:
        """Whether another request can be sent: the last response is complete, and nothing came after it."""
        transport = self._transport
        is_free = self._has_ended and not transport.get_write_buffer_size()
        return is_free and self._can_be_reused and not transport.is_closing()

    @property
    def was_idle(self) -> bool:
        """Whether this is not the first response of the connection, and nothing of it has arrived."""
        return self.idle_since > 0 and not self._n_head

    async def request(self, data: bytes) -> None:
        """Send a request and wait for the headers of its response. Raises `HttpError`."""
        self.status, self.headers = 0, dict[bytes, bytes]()
        self._body, self._n_head = bytearray(), 0
        self._has_head = self._has_ended = False
        self._transport.write(data)
        while not self._has_head:
            await self._wait()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises `HttpError` if it breaks off."""
        while True:
            if self._body:
                data, self._body = bytes(self._body), bytearray()
                if self._is_paused and not self._transport.is_closing():
                    self._transport.resume_reading()
                self._is_paused = False
                yield data
            elif self._has_ended:
                return
            else:
                await self._wait()

    async def skip_rest(self) -> None:
        """Read the response to its end if that comes at once, so that the connection can be used again."""
        with suppress(TimeoutError, HttpError):
            async with asyncio.timeout(None if self._has_ended else REST_SECONDS):
                async for _ in self.chunks():
                    pass

    def close(self) -> None:
        """Close the connection at once, so that the server stops to answer."""
        self._transport.abort()

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._changed.clear()
        await self._changed.wait()

    def _fail(self, text: str) -> None:
        self._can_be_reused = False
        if not self._has_ended:
            self._failure = self._failure or HttpError(text)
            self._changed.set()
        self._transport.abort()

    # called by asyncio

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self._transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse a part of a response."""
        if self._failure is not None:
            return
        if self._has_ended:
            self._fail("the server sent something unasked")
            return
        if not self._has_head:
            self._n_head += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the server's response is not HTTP: {error}")
        if not self._has_head and self._n_head > MAX_HEAD:
            self._fail("the headers of the server's response are too long")

    def connection_lost(self, error: Exception | None) -> None:
        """End the response, which is complete only if its length was to be told by this."""
        has_length = (
            self._has_ended or b"content-length" in self.headers or b"transfer-encoding" in self.headers
        )
        if error is None and self._failure is None and not has_length and self._has_head:
            self.on_message_complete()
        self._fail("the server closed the connection")

    # called by httptools

    def on_message_begin(self) -> None:
        """Note whether a second response follows, which nobody has asked for."""
        if self._has_ended:
            self._can_be_reused = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Wake the reader, unless the response is only an interim one (100 to 199)."""
        if self._has_ended:
            return
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self._has_head = True
            self._changed.set()

    def on_body(self, data: bytes) -> None:
        """Keep a part of the body, and read no more if there is much of it."""
        if self._has_ended:
            return
        self._body += data
        if len(self._body) > MAX_UNREAD and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._changed.set()

    def on_message_complete(self) -> None:
        """End the response, or the interim one."""
        if not self._has_head:
            self.headers.clear()
            return
        self._can_be_reused = self._can_be_reused and self._parser.should_keep_alive()
        self._has_ended = True
        self._changed.set()


class HttpClient:
    """Connections to servers, one for each open request. Its methods belong to one event loop.

    ``headers`` are sent with every request.
    """

    def __init__(self, headers: Mapping[str, str], connect_seconds: float) -> None:
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._connect_seconds = connect_seconds
        self._idle: defaultdict[str, list[HttpConnection]] = defaultdict(list)

    @asynccontextmanager
    async def exchange(self, url: str, path: str, body: bytes | None = None) -> AsyncIterator[HttpConnection]:
        """Send JSON (or GET without a ``body``) to a path below a URL. The block gets the response.

        Raises `HttpError`. The connection is closed if the block raises before the end of the response. If
        the server closes a connection that had been idle, as it may at any moment, the request is sent again.
        """
        parts = _split(url)
        method, more = "GET", ""
        if body is not None:
            method, more = "POST", f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head = f"{method} {parts.path}{path} HTTP/1.1\r\nhost: {parts.netloc}\r\n{self._headers}{more}\r\n"
        data = head.encode("ascii") + (body or b"")
        connection = self._take(url) or await self._connect(parts)
        try:
            try:
                await connection.request(data)
            except HttpError:
                if not connection.was_idle:
                    raise
                connection = await self._connect(parts)
                await connection.request(data)
            yield connection
            await connection.skip_rest()
        finally:
            if connection.is_reusable and len(self._idle[url]) < MAX_IDLE:
                connection.idle_since = monotonic()
                self._idle[url].append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the connections that no request uses."""
        for connections in self._idle.values():
            while connections:
                connections.pop().close()

    def _take(self, url: str) -> HttpConnection | None:
        """Return the connection that was used last, if it is still good. The others are at least as old."""
        connections, now = self._idle[url], monotonic()
        while connections:
            connection = connections.pop()
            if connection.is_reusable and now - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def _connect(self, parts: SplitResult) -> HttpConnection:
        tls = _tls() if parts.scheme == "https" else None
        port = parts.port or (80 if tls is None else 443)
        try:
            async with asyncio.timeout(self._connect_seconds):
                loop = asyncio.get_running_loop()
                host = parts.hostname or ""
                return (await loop.create_connection(HttpConnection, host, port, ssl=tls))[1]
        except TimeoutError:
            raise ConnectError(f"no connection within {self._connect_seconds:g} s") from None
        except OSError as error:  # also what is wrong with a certificate
            raise ConnectError(str(error) or type(error).__name__) from None


_split = cache(urlsplit)


@cache
def _tls() -> ssl.SSLContext:
    """Return the settings of TLS, with the certificates that this machine trusts."""
    return ssl.create_default_context()
