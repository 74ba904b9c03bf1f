"""Other servers before which this one stands: which are there, which models they have, and how busy they are.

Any server with OpenAI's API will do: vLLM, another Herd, and so on. Every few seconds each is asked for its
models. One that does not answer gets no requests until it does. Redirects are never followed, the upstreams'
headers are not passed on, the environment's proxies are not used, and the key goes nowhere but to the
addresses that the operator gave.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientResponse

from .. import __version__
from ..errors import ConfigError
from .http_client import HttpClient, HttpError

log = logging.getLogger("herd.serve")

REFRESH_SECONDS = 3.0
PROBE_SECONDS = 5.0
"""How long an upstream may take to list its models or to count tokens."""
MAX_ANSWER = 16 << 20
"""Bytes of a response or of an event of an upstream that are read. A larger one is an error."""
TELLING_OWNERS = ("vllm", "herd")
"""``owned_by`` of models of servers that tell the usage in every chunk when they are asked to."""


@dataclass(frozen=True)
class UpstreamTimes:
    """Time limits in seconds: to connect, until the answer begins, and between its pieces."""

    connect: float = 5.0
    first: float = 900.0
    silence: float = 120.0


@dataclass
class Upstream:
    """One other server. ``models`` are the cards of its models by id, as it last told them.

    ``n_open`` is the number of requests that it is answering for this server. ``counts_tokens``: it has
    ``/tokenize`` (None: not tried yet).
    """

    url: str
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_up: bool = False
    n_open: int = 0
    counts_tokens: bool | None = None

    def tells_usage(self, model: str) -> bool:
        """Whether the usage comes in every chunk of a stream if it is asked for."""
        return self.models.get(model, {}).get("owned_by") in TELLING_OWNERS


class Fleet:
    """The upstreams of a server. Its methods belong to one event loop.

    ``key`` is sent to every upstream. ``secret`` makes the salts of caches. ``context`` is that of models
    whose upstream does not tell it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        secret: bytes,
        context: int | None = None,
        times: UpstreamTimes | None = None,
        refresh_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self.upstreams = [Upstream(url) for url in dict.fromkeys(map(checked_url, urls))]
        self.context, self.times = context, times or UpstreamTimes()
        self._secret, self._refresh_seconds = secret, refresh_seconds
        headers = {"user-agent": f"herd/{__version__}", "accept-encoding": "identity"}
        if key:
            if not (key.isascii() and key.isprintable()):
                raise ConfigError("HERD_UPSTREAM_KEY: has characters that no key has, e.g. a line end")
            headers["authorization"] = f"Bearer {key}"
        self.client = HttpClient(headers, self.times.connect)
        self._watching: asyncio.Task[None] | None = None

    async def start(self, changed: Callable[[], None]) -> None:
        """Ask every upstream for its models, and go on doing so. ``changed`` is called after each time."""
        await self.refresh()
        changed()
        self._watching = asyncio.create_task(self._watch(changed))

    async def stop(self) -> None:
        """Stop asking, and close all connections."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
            await self.client.close()

    async def refresh(self) -> None:
        """Ask every upstream for its models."""
        await asyncio.gather(*(self._refresh(upstream) for upstream in self.upstreams))

    def cards(self) -> dict[str, Mapping[str, Any]]:
        """Return the cards of all models by id. An upstream that is down keeps those that it had."""
        cards: dict[str, Mapping[str, Any]] = {}
        for upstream in self.upstreams:
            cards = {**upstream.models, **cards}
        return cards

    def choose(self, model: str, tried: Collection[str] = (), beginning: bytes = b"") -> Upstream | None:
        """Return the upstream that has the model and the fewest open requests, is up, and not in ``tried``.

        Of equally busy ones, prompts with the same ``beginning`` get the same one, because it has them in its
        cache.
        """
        able = [
            each for each in self.upstreams if each.is_up and model in each.models and each.url not in tried
        ]

        def order(upstream: Upstream) -> tuple[int, bytes]:
            return upstream.n_open, hashlib.sha256(upstream.url.encode() + b"\0" + beginning).digest()

        return min(able, key=order, default=None)

    def salt(self, group: str) -> str:
        """Return the salt of a cache group, which nobody can guess who does not know the secret."""
        digest = hmac.new(self._secret, group.encode("utf-8", "replace"), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def mark_down(self, upstream: Upstream, reason: str) -> None:
        """Give an upstream no more requests until it lists its models again."""
        if upstream.is_up:
            log.warning("upstream %s is down: %s", upstream.url, reason)
        upstream.is_up, upstream.counts_tokens = False, None

    async def ask(self, upstream: Upstream, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return the status and the body of a short response. Raises `HttpError`."""
        try:
            async with (
                asyncio.timeout(PROBE_SECONDS),
                self.client.exchange(upstream.url, path, body) as response,
            ):
                return response.status, await read_limited(response)
        except TimeoutError:
            raise HttpError(f"no answer within {PROBE_SECONDS:g} s") from None

    async def _watch(self, changed: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            await self.refresh()
            changed()

    async def _refresh(self, upstream: Upstream) -> None:
        try:
            status, body = await self.ask(upstream, "/v1/models")
            if status != 200:
                raise ValueError(f"GET /v1/models is answered with {status}")
            models = {card["id"]: card for card in json.loads(body)["data"] if isinstance(card["id"], str)}
        except (HttpError, ValueError, KeyError, TypeError) as error:
            self.mark_down(upstream, describe(error))
            return
        if not upstream.is_up:
            log.info("upstream %s is up with %s", upstream.url, ", ".join(models) or "no model")
        upstream.models, upstream.is_up = models, True


async def read_limited(response: ClientResponse) -> bytes:
    """Return the body of a response. Raises ValueError if it is too long."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER:
            raise ValueError(f"the upstream's answer is longer than {MAX_ANSWER:,} bytes")
    return bytes(body)


def describe(error: Exception) -> str:
    """Return what went wrong with an upstream, without its key."""
    return (str(error).strip() or type(error).__name__)[:200]


def checked_url(url: str) -> str:
    """Return the root of an upstream, without ``/v1``. Raises ConfigError for what is not an address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--upstream {url}: give the address of a server, e.g. http://10.0.0.5:8000")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"--upstream has a password in the address of {parts.hostname}: put it into HERD_UPSTREAM_KEY"
        )
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--upstream {url!r}: write the address in ASCII (xn-- and %) and without spaces")
    if parts.query or parts.fragment:
        raise ConfigError(f"--upstream {url}: leave out what follows the path")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1")
