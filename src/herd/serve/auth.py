"""Who may call which route.

Every route states its scope: a parameter of a type such as `ForChat` for routes that need a key,
``Depends(public)`` for those that do not. An application with a route that states neither does not start.

A key comes in ``Authorization: Bearer`` or in ``x-api-key``. Both are checked alike, and if a request has
both they must be the same key. 401: no valid key. 403: a valid key that may not do this.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sql
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from ..errors import ConfigError
from .errors import Forbidden, StoreError, Unauthorized
from .keys import SCOPES, KeyInfo, Scope, list_keys, verify_token
from .store import Store, now_ms
from .tables import meta

log = logging.getLogger("herd.serve")
POLL_SECONDS = 0.3
"""How often a server looks for keys that were revoked by another process."""


@dataclass(frozen=True)
class Principal:
    """The sender of a request. ``models`` None means all. ``cache_group`` is the `tenant` of engine requests.

    ``tools`` are groups of tools on the server that it was granted. An administrator may use all of them.

    ``digest`` and ``keys_version`` tell `Authenticator.has_ended` which secret was used, and how fresh it is.
    """

    key_id: str
    name: str
    scopes: frozenset[Scope]
    cache_group: str
    models: frozenset[str] | None = None
    expires_ms: int | None = None
    digest: str = ""
    keys_version: int = 0
    tools: frozenset[str] = frozenset()

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def actor(self) -> str:
        """The name of this key in the audit log."""
        return f"key:{self.key_id}"

    def check_model(self, model: str) -> None:
        """Raise `Forbidden` if the key may not use this model."""
        if self.models is not None and model not in self.models:
            allowed = ", ".join(sorted(self.models)) or "none"
            raise Forbidden(f"this key may not use the model {model!r}; it may use: {allowed}")

    def may_use_tools(self, group: str) -> bool:
        """Return whether it may use the tools of a group on the server."""
        return self.is_admin or group in self.tools

    @classmethod
    def local(cls) -> Principal:
        """Return the principal of a server without keys, which only listens to its own machine."""
        return cls("", "local", frozenset(SCOPES), "")


class Authenticator:
    """Checks keys against a store. Without a store everybody is `Principal.local`.

    A thread reads the keys again whenever one was changed, so that open answers end soon after a revocation,
    also those that wait and send nothing.
    """

    def __init__(self, store: Store | None, poll_seconds: float = POLL_SECONDS) -> None:
        self._store, self._poll_seconds = store, poll_seconds
        self._version = 0
        self._active: dict[str, KeyInfo] = {}  # the keys that are not revoked, by id
        self._watched: dict[object, tuple[Principal, Callable[[], None]]] = {}
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        if store is not None:
            self._refresh(store)
            self._watcher = threading.Thread(target=self._poll, args=(store,), name="herd-keys", daemon=True)
            self._watcher.start()

    @property
    def is_quick(self) -> bool:
        """Whether `authenticate` is faster (0.1 ms) than a thread. Readers of SQLite's WAL never wait."""
        return self._store is None or self._store.path is not None

    def authenticate(self, authorization: Iterable[str], api_key: Iterable[str]) -> Principal:
        """Return the sender of a request with these headers. Raises `Unauthorized`, or `StoreError`."""
        if self._store is None:
            return Principal.local()
        tokens = {token for value in authorization if (token := _bearer(value)) is not None} | set(api_key)
        if not tokens:
            raise Unauthorized("no key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'")
        if len(tokens) > 1:
            raise Unauthorized("the request has two different keys: send one")
        verified = verify_token(self._store, tokens.pop())
        if verified is None:
            raise Unauthorized("the key is wrong: check that it was copied completely")
        info, version = verified
        if (state := info.state(now_ms())) != "active":
            what = "been revoked" if state == "revoked" else "expired"
            raise Unauthorized(f"this key has {what} ({info.id})")
        return Principal(
            key_id=info.id, name=info.name, scopes=info.policy.scopes, cache_group=info.cache_group,
            models=info.policy.models, expires_ms=info.expires_ms, digest=info.digest, keys_version=version,
            tools=info.policy.tools,
        )  # fmt: skip

    def has_ended(self, principal: Principal) -> bool:
        """Return whether the key was revoked, rotated or has expired since it was checked. Costs no query."""
        expires = principal.expires_ms
        if self._version > principal.keys_version:
            info = self._active.get(principal.key_id)
            if info is None or info.digest != principal.digest:
                return True
            expires = info.expires_ms
        return expires is not None and expires <= now_ms()

    def watch(self, principal: Principal, end: Callable[[], None]) -> Callable[[], None]:
        """Call ``end`` from another thread soon after the key ends. Return a function that stops this."""
        ticket = object()
        self._watched[ticket] = (principal, end)
        return lambda: self._watched.pop(ticket, None) and None

    def close(self) -> None:
        """Stop watching the store."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()

    def _poll(self, store: Store) -> None:
        away = False
        while not self._closing.wait(self._poll_seconds):
            try:
                self._refresh(store)
                away = False
            except StoreError as error:
                if not away:
                    log.warning("revoked keys are not noticed while this lasts: %s", error)
                away = True
            for principal, end in list(self._watched.values()):
                if self.has_ended(principal):
                    end()

    def _refresh(self, store: Store) -> None:
        with store.read() as connection:
            version = connection.execute(sql.select(meta.c.keys_version)).scalar_one()
        if version != self._version:
            self._active = {info.id: info for info in list_keys(store) if info.revoked_ms is None}
            self._version = version  # last: `has_ended` reads the version first


def require(scope: Scope) -> Callable[[Request], Awaitable[Principal]]:
    """Return a dependency of FastAPI that lets keys with ``scope`` pass and returns their `Principal`."""

    async def check(request: Request) -> Principal:
        authenticator: Authenticator = request.app.state.authenticator
        values = request.headers.getlist("authorization"), request.headers.getlist("x-api-key")
        if authenticator.is_quick:
            principal = authenticator.authenticate(*values)
        else:
            principal = await run_in_threadpool(authenticator.authenticate, *values)
        request.state.key = principal.name
        if scope not in principal.scopes:
            raise Forbidden(f"this key does not have the scope {scope!r}")
        return principal

    check.scope = scope  # type: ignore[attr-defined]
    return check


ForChat = Annotated[Principal, Depends(require("chat"))]
"""This type and the next ones: the sender of a request to a route of this scope."""
ForCompletions = Annotated[Principal, Depends(require("completions"))]
ForResponses = Annotated[Principal, Depends(require("responses"))]
ForMessages = Annotated[Principal, Depends(require("messages"))]
ForOllama = Annotated[Principal, Depends(require("ollama"))]
ForEmbeddings = Annotated[Principal, Depends(require("embeddings"))]
ForTokenize = Annotated[Principal, Depends(require("tokenize"))]
ForModels = Annotated[Principal, Depends(require("models"))]
ForUsage = Annotated[Principal, Depends(require("usage"))]
ForMetrics = Annotated[Principal, Depends(require("metrics"))]
ForAdmin = Annotated[Principal, Depends(require("admin"))]


def public() -> None:
    """Mark a route that needs no key. A dependency of FastAPI that lets everybody pass."""


public.scope = "public"  # type: ignore[attr-defined]


def scope_of(route: Any) -> str | None:
    """Return the scope that a route of FastAPI states, ``public``, or None if it states none."""
    waiting = list(getattr(getattr(route, "dependant", None), "dependencies", ()))
    while waiting:
        dependency = waiting.pop()
        if (scope := getattr(dependency.call, "scope", None)) is not None:
            return str(scope)
        waiting += dependency.dependencies
    return None


def all_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """Yield the routes of an application and of the routers in it, which FastAPI keeps apart."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from all_routes(router.routes)


def refuse_unscoped(routes: Iterable[Any]) -> None:
    """Raise RuntimeError if a route states neither a scope nor that it is public."""
    if unscoped := [getattr(route, "path", str(route)) for route in routes if scope_of(route) is None]:
        raise RuntimeError(f"these routes do not say who may call them: {', '.join(unscoped)}")


def check_binding(host: str, with_keys: bool) -> None:
    """Raise ConfigError if a server without keys would listen to other machines."""
    address = ip_address(host.strip("[]"))
    is_loopback = host == "localhost" or (address is not None and address.is_loopback)
    if not with_keys and not is_loopback:
        raise ConfigError(
            f"--host {host} lets other machines in: add --keys (the first start prints an administrator's "
            "key), or listen on 127.0.0.1"
        )


def _bearer(value: str) -> str | None:
    """Return the token of a header value with the scheme Bearer. Other schemes belong to proxies: None."""
    scheme, _, token = value.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a host is, or None for a name, and for "", which means every address."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
