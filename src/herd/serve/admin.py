"""Routes for operators under ``/herd/v1``: keys, usage, the state of the server, and ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from ..errors import ConfigError
from .auth import ForAdmin, ForMetrics, ForModels, ForUsage
from .body import read_json
from .errors import NotFound
from .keys import (
    KeyInfo,
    KeyPolicy,
    change_key,
    create_key,
    find_key,
    list_keys,
    public_view,
    revoke_key,
    rotate_key,
)
from .prices import read_prices
from .problems import BadRequest
from .shared_prompts import read_prompts, write_prompt
from .statements import spent
from .store import Store, now_ms
from .usage import read_usage, usage_csv

router = APIRouter()
NO_STORE = {"cache-control": "no-store"}
"""Headers of answers with a key in them."""


class NewKey(BaseModel, extra="forbid"):
    """The body of a request for a key. ``currency`` is the currency of budgets in money."""

    name: str
    policy: KeyPolicy = KeyPolicy()
    expires_ms: int | None = None
    currency: str = ""


class SharedPrompt(BaseModel, extra="forbid"):
    """The body of a request to share a system message."""

    text: str


class KeyChange(BaseModel, extra="forbid"):
    """The body of a request to change a key: the fields of its policy that are to be different, and its end.

    ``expires_ms`` null: it never expires.
    """

    policy: dict[str, Any] = {}
    currency: str = ""
    expires_ms: int | None = None


@router.get("/herd/v1/keys")
def keys(request: Request, principal: ForAdmin) -> list[dict[str, Any]]:
    """List all keys."""
    return [public_view(info) for info in list_keys(_store(request))]


@router.post("/herd/v1/keys", status_code=201)
async def new_key(request: Request, principal: ForAdmin) -> Response:
    """Create a key. The answer is the only place where its text ever is."""
    asked = NewKey.model_validate(await read_json(request, request.app.state.settings))

    def work() -> dict[str, Any]:
        more = asked.model_dump(include={"expires_ms", "currency"})
        info, token = create_key(_store(request), asked.name, asked.policy, actor=principal.actor, **more)
        return public_view(info) | {"key": token}

    with _refusing("name"):
        return JSONResponse(await run_in_threadpool(work), 201, NO_STORE)


@router.get("/herd/v1/keys/{key_id}")
def one_key(request: Request, key_id: str, principal: ForAdmin) -> dict[str, Any]:
    """Show a key."""
    return public_view(find_key(_store(request), _known(request, key_id)))


@router.patch("/herd/v1/keys/{key_id}")
async def changed_key(request: Request, key_id: str, principal: ForAdmin) -> dict[str, Any]:
    """Change fields of a key's policy, e.g. its budgets, or its end."""
    asked = KeyChange.model_validate(await read_json(request, request.app.state.settings))

    def work() -> dict[str, Any]:
        known, store = _known(request, key_id), _store(request)
        expires = asked.expires_ms if "expires_ms" in asked.model_fields_set else ...
        return public_view(change_key(store, known, asked.policy, principal.actor, asked.currency, expires))

    with _refusing():
        return await run_in_threadpool(work)


@router.delete("/herd/v1/keys/{key_id}")
def end_key(request: Request, key_id: str, principal: ForAdmin) -> dict[str, Any]:
    """Revoke a key."""
    return public_view(revoke_key(_store(request), _known(request, key_id), principal.actor))


@router.post("/herd/v1/keys/{key_id}/rotate")
def new_secret(request: Request, key_id: str, principal: ForAdmin) -> Response:
    """Give a key a new secret."""
    with _refusing():
        info, token = rotate_key(_store(request), _known(request, key_id), principal.actor)
    return JSONResponse(public_view(info) | {"key": token}, headers=NO_STORE)


@router.get("/herd/v1/usage")
def usage(
    request: Request,
    principal: ForUsage,
    since: str | None = None,
    until: str | None = None,
    key: str | None = None,
    format: str = "json",
) -> Response:
    """Return usage by day, key and model: the caller's own, or for an administrator that of all keys."""
    store = _store(request)
    if key is None:
        key = None if principal.is_admin else principal.key_id
    elif principal.is_admin:
        key = _known(request, key)
    elif key != principal.key_id:
        raise _no_key()  # as if it did not exist: other keys' ids are none of the caller's business
    with _refusing("since" if since else "until"):
        rows = read_usage(store, since=since, until=until, key_id=key)
    currency = read_prices(store)[1]
    if format == "csv":
        return Response(usage_csv(rows, currency), media_type="text/csv; charset=utf-8")
    budgets = _budgets(store, find_key(store, principal.key_id))
    return JSONResponse({"currency": currency, "days": [asdict(row) for row in rows], "budgets": budgets})


@router.get("/herd/v1/prompts")
def prompts(request: Request, principal: ForModels) -> dict[str, str]:
    """Return the shared prompts by name. Without keys there are none."""
    return {} if request.app.state.store is None else read_prompts(request.app.state.store)


@router.put("/herd/v1/prompts/{name}")
async def share_prompt(request: Request, name: str, principal: ForAdmin) -> dict[str, str]:
    """Share a prompt with everybody who has a key. A prompt without text is removed."""
    asked = SharedPrompt.model_validate(await read_json(request, request.app.state.settings))
    with _refusing("name"):
        return await run_in_threadpool(write_prompt, _store(request), name, asked.text, principal.actor)


@router.get("/herd/v1/stats")
def stats(request: Request, principal: ForMetrics) -> dict[str, dict[str, Any]]:
    """Return the state of the engine of each model."""
    return {name: asdict(stats) for name, stats in request.app.state.models.stats().items()}


@router.get("/metrics")
def metrics(request: Request, principal: ForMetrics) -> Response:
    """Return the metrics for Prometheus."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@contextmanager
def _refusing(param: str | None = None) -> Iterator[None]:
    """Refuse a request for which the block raises ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise BadRequest(str(error), param) from None


def _store(request: Request) -> Store:
    store: Store | None = request.app.state.store
    if store is None:
        raise NotFound("this server has no keys, and so no usage by key")
    return store


def _budgets(store: Store, info: KeyInfo) -> list[dict[str, Any]]:
    """Return the budgets of a key with what is used and reserved of each now."""
    with store.read() as connection:
        states = [
            (budget, *spent(connection, info.id, budget.unit, budget.period, now_ms()))
            for budget in info.policy.budgets
        ]
    return [budget.model_dump() | {"used": used, "reserved": reserved} for budget, used, reserved in states]


def _known(request: Request, key_id: str) -> str:
    """Return the id of a key that exists. Names are not accepted, because they can change hands."""
    if all(info.id != key_id for info in list_keys(_store(request))):
        raise _no_key()
    return key_id


def _no_key() -> NotFound:
    return NotFound("there is no such key")
