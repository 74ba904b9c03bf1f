"""The client for upstreams reads what httpx reads, whatever the pieces in which it arrives, and keeps connections."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
import uvloop

from herd.serve import http_client
from herd.serve.http_client import ConnectError, HttpClient, HttpError

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nX-Name: Value\r\n\r\n3\r\none\r\n4;x=y\r\n\r\ntw\r\n0\r\n\r\n"
WITH_LENGTH = b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nthree"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nall of it"
INTERIM = b"HTTP/1.1 100 Continue\r\nx-early: 1\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"
RESPONSES = [
    CHUNKED,
    WITH_LENGTH,
    UNTIL_CLOSED,
    INTERIM + CHUNKED,
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nold",
]
BROKEN = [
    b"",
    CHUNKED[:-20],
    WITH_LENGTH[:-1],
    b"HTTP/1.1 200 OK\r\ncontent-le",
    b"no HTTP at all\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnumber\r\nx\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nthree",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    WITH_LENGTH + b"garbage",
    b"HTTP/1.1 200 OK\r\nx-long: " + 1_000_000 * b"x" + b"\r\n\r\n",
]


class Peer:
    """A server that answers every request with the same bytes, in pieces of ``size``. ``n_connections`` counts."""

    def __init__(
        self, response: bytes, size: int = 1 << 20, *, closes: bool = False, after: bytes = b""
    ) -> None:
        self.response, self.size, self.closes, self.after = response, size, closes, after
        self.n_connections = 0
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                for start in range(0, len(self.response), self.size):
                    writer.write(self.response[start : start + self.size])
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.closes:
                    break
                if self.after:
                    await asyncio.sleep(0.02)
                    writer.write(self.after)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()


@asynccontextmanager
async def serving(peer: Peer):
    """Run a peer and yield its URL."""
    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def opened(headers=(), seconds=5.0):
    """Yield a client, and close it."""
    client = HttpClient(dict(headers), seconds)
    try:
        yield client
    finally:
        await client.close()


async def read(
    client: HttpClient, url: str, body: bytes | None = b"{}"
) -> tuple[int, dict[bytes, bytes], bytes]:
    async with client.exchange(url, "/path", body) as response:
        pieces = [piece async for piece in response.content.iter_any()]
        return response.status, {k.lower(): v for k, v in response.raw_headers}, b"".join(pieces)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("response", RESPONSES)
def test_a_response_is_the_one_that_httpx_reads(response, size):
    async def both():
        peer = Peer(response, size, closes=True)
        async with serving(peer) as url, httpx.AsyncClient() as other, opened({"x": "y"}) as client:
            ours = await read(client, url)
            theirs = await other.post(f"{url}/path", content=b"{}")
        return ours, (theirs.status_code, {k.lower(): v for k, v in theirs.headers.raw}, theirs.content)

    ours, theirs = uvloop.run(both())
    assert ours == theirs


@pytest.mark.parametrize("size", [1000, 1 << 20])
@pytest.mark.parametrize("response", BROKEN)
def test_a_broken_response_is_an_error(response, size):
    async def ask():
        async with serving(Peer(response, size, closes=True)) as url, opened() as client:
            await read(client, url)

    with pytest.raises(HttpError):
        uvloop.run(ask())


def test_what_is_sent_is_exactly_what_was_given():
    async def ask():
        peer = Peer(WITH_LENGTH)
        async with serving(peer) as url, opened({"authorization": "Bearer k"}) as client:
            await read(client, f"{url}/b%2Fse", b'{"a": 1}')
            await read(client, f"{url}/b%2Fse", None)
        return url.removeprefix("http://").encode(), peer.requests

    def parts(request: bytes):
        head, _, body = request.partition(b"\r\n\r\n")
        first, *headers = head.split(b"\r\n")
        return first, {name.lower(): value for name, value in (each.split(b": ") for each in headers)}, body

    host, (post, get) = uvloop.run(ask())
    given = {b"host": host, b"authorization": b"Bearer k"}
    json = {b"content-type": b"application/json", b"content-length": b"8"}
    assert parts(post) == (b"POST /b%2Fse/path HTTP/1.1", given | json, b'{"a": 1}')
    assert parts(get) == (b"GET /b%2Fse/path HTTP/1.1", given, b"")


def connections(peer: Peer, n_requests: int = 3, pause: float = 0.0) -> int:
    """Return how many connections some requests made, one after another."""

    async def ask():
        async with serving(peer) as url, opened() as client:
            for _ in range(n_requests):
                async with client.exchange(url, "/", b"{}") as response:
                    async for _ in response.content.iter_any():
                        break  # the rest comes at once
                await asyncio.sleep(pause)

    uvloop.run(ask())
    return peer.n_connections


def test_a_connection_is_used_again(monkeypatch):
    assert connections(Peer(CHUNKED)) == 1
    assert connections(Peer(CHUNKED, size=5)) == 1
    assert connections(Peer(INTERIM + WITH_LENGTH)) == 1
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 0.0)
    assert connections(Peer(CHUNKED)) == 3


@pytest.mark.parametrize(
    "peer",
    [
        Peer(WITH_LENGTH, closes=True),
        Peer(WITH_LENGTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")),
        Peer(WITH_LENGTH + WITH_LENGTH),
        Peer(WITH_LENGTH, after=WITH_LENGTH),
        Peer(WITH_LENGTH, after=b"garbage"),
    ],
)
def test_a_connection_that_is_closed_or_says_more_than_was_asked_is_not_used_again(peer):
    assert connections(peer, pause=0.05) == 3


def test_a_request_is_sent_again_if_the_server_closes_a_connection_that_was_idle():
    n_requests = []

    async def answer_once(reader, writer):
        await reader.readuntil(b"{}")
        n_requests.append(1)
        writer.write(WITH_LENGTH)
        await reader.readuntil(b"{}")
        n_requests.append(2)
        writer.close()

    async def ask():
        async with serving(answer_once) as url, opened() as client:
            return [await read(client, url) for _ in range(3)]

    answers = uvloop.run(ask())
    assert [body for *_, body in answers] == 3 * [b"three"]
    assert n_requests == [1, 2, 1, 2, 1]


def test_a_response_whose_rest_does_not_come_is_closed(monkeypatch):
    monkeypatch.setattr(http_client, "REST_SECONDS", 0.01)
    assert connections(Peer(CHUNKED[:-5])) == 3


def test_a_reader_that_leaves_closes_the_connection_at_once():
    async def leave():
        left = asyncio.Event()

        async def watched(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(CHUNKED[:-5])
            await reader.read()  # returns when the client has closed
            left.set()
            writer.close()

        async with serving(watched) as url, opened() as client:
            with pytest.raises(ZeroDivisionError):
                async with client.exchange(url, "/", None):
                    raise ZeroDivisionError
            await asyncio.wait_for(left.wait(), 5)

    uvloop.run(leave())


def test_a_slow_reader_holds_the_server_back():
    n_sent = 0

    async def flood(reader, writer):
        nonlocal n_sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        piece = bytes(100_000)
        while n_sent < 100_000_000:
            writer.write(piece)
            n_sent += len(piece)
            await writer.drain()
        writer.close()

    async def ask():
        async with serving(flood) as url, opened() as client, client.exchange(url, "/", None) as response:
            await asyncio.sleep(0.3)
            n_before = n_sent
            n_read = 0
            async for piece in response.content.iter_any():
                n_read += len(piece)
            return n_before, n_read

    n_before, n_read = uvloop.run(ask())
    assert n_before < 50_000_000
    assert n_read == 100_000_000


def test_a_server_that_cannot_be_reached_is_told_apart():
    async def nobody():
        async with opened() as client:
            await read(client, "http://127.0.0.1:1")

    with pytest.raises(ConnectError):
        uvloop.run(nobody())

    async def with_tls(server, seconds: float):
        async with serving(server) as url, opened(seconds=seconds) as client:
            await read(client, url.replace("http:", "https:"))

    async def silent(reader, writer):
        await reader.read()
        writer.close()

    async def plain(reader, writer):
        writer.write(b"what?")
        writer.close()

    with pytest.raises(ConnectError, match=r"within 0\.05 s"):
        uvloop.run(with_tls(silent, 0.05))
    with pytest.raises(ConnectError):
        uvloop.run(with_tls(plain, 5))
