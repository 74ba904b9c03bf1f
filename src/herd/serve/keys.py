"""Keys: what they allow, and how they are made, found, rotated and revoked.

A key is ``herd-<id>-<secret>``. The id is public: lists, logs and bills name it. The secret has 256 random
bits, so one round of SHA-256 is enough to store it safely. Slow password hashes protect secrets that can be
guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Annotated, Any, Literal, get_args

import sqlalchemy as sql
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ..errors import ConfigError
from .prices import choose_currency, parse_money
from .store import Store, now_ms, record
from .tables import keys, meta

Scope = Literal[
    "chat", "completions", "responses", "messages", "ollama", "embeddings", "tokenize", "models", "usage",
    "metrics", "admin",
]  # fmt: skip
"""The group of routes that a key may use. ``usage`` is the key's own usage."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
USER_SCOPES = frozenset(SCOPES) - {"metrics", "admin"}
"""Scopes of a key that was created without naming any."""
ToolGroup = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_ID_LENGTH, _SECRET_LENGTH = 12, 43
_TOKEN = re.compile(rf"herd-([a-z0-9]{{{_ID_LENGTH}}})-([A-Za-z0-9]{{{_SECRET_LENGTH}}})")
_NAME = re.compile(r"[^\W_][\w .@+-]{0,63}")
_NO_KEY_DIGEST = "0" * 64
_LOCKED_KEY = sql.select(keys).where(keys.c.id == sql.bindparam("key_id")).with_for_update()
_KEY_AND_VERSION = (
    sql.select(keys, meta.c.keys_version)
    .join(meta, meta.c.id == 1)
    .where(keys.c.id == sql.bindparam("key_id"))
)


class TokenBudget(BaseModel):
    """The most that a key may use in a day or month of UTC: tokens, or millionths of the currency."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    unit: Literal["tokens", "money"]
    period: Literal["day", "month"]
    amount: int = Field(ge=0, le=10**15)


class KeyPolicy(BaseModel):
    """The permissions of a key. None means every model for ``models``, and no limit for a limit.

    Keys with the same ``cache_group`` share cached prompt beginnings. By default a key shares with no other.
    ``tools`` are names of tools that run on the server, or of MCP servers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    scopes: frozenset[Scope] = frozenset(USER_SCOPES)
    models: frozenset[str] | None = None
    cache_group: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    concurrent: PositiveInt | None = None
    budgets: tuple[TokenBudget, ...] = ()
    tools: frozenset[ToolGroup] = frozenset()


@dataclass(frozen=True)
class KeyInfo:
    """A key as lists show it. Times are in milliseconds since 1970. ``digest`` is the stored hash."""

    id: str
    name: str
    digest: str
    policy: KeyPolicy
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None

    @property
    def cache_group(self) -> str:
        """The cache group, with a prefix so that no chosen name equals another key's own group."""
        chosen = self.policy.cache_group
        return f"key:{self.id}" if chosen is None else f"group:{chosen}"

    def state(self, at_ms: int) -> Literal["active", "expired", "revoked"]:
        """Return whether the key works at a time."""
        if self.revoked_ms is not None:
            return "revoked"
        return "expired" if self.expires_ms is not None and self.expires_ms <= at_ms else "active"


def public_view(info: KeyInfo) -> dict[str, Any]:
    """Return a key as JSON shows it, without the digest. Times are in milliseconds since 1970."""
    shown = {name: getattr(info, name) for name in ("id", "name", "created_ms", "expires_ms", "revoked_ms")}
    return shown | {"state": info.state(now_ms()), "policy": info.policy.model_dump(mode="json")}


def create_key(
    store: Store,
    name: str,
    policy: KeyPolicy,
    *,
    actor: str,
    expires_ms: int | None = None,
    currency: str = "",
) -> tuple[KeyInfo, str]:
    """Store a new key. Return it with its text, which is not stored and cannot be shown again.

    ``currency`` is the currency of budgets in money. Raises ConfigError for a name that is taken.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"key name {name!r}: use up to 64 letters, digits, spaces and _.@+-, first a letter or digit"
        )
    _checked_end(name, expires_ms)
    id_ = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(_ID_LENGTH))
    secret = _new_secret()
    info = KeyInfo(id_, name, _digest(secret), policy, now_ms(), expires_ms, None)
    with store.write(durable=True) as connection:
        if any(other.name == name for other in _select(connection) if other.revoked_ms is None):
            raise ConfigError(
                f"key {name}: a key of this name exists; choose another name, or revoke it first"
            )
        if any(budget.unit == "money" for budget in policy.budgets) and currency:
            choose_currency(connection, currency)
        connection.execute(keys.insert().values(vars(info) | {"policy": policy.model_dump(mode="json")}))
        _changed(connection, actor, "create key", info)
    return info, _token(id_, secret)


def list_keys(store: Store) -> list[KeyInfo]:
    """Return all keys, also revoked and expired ones, oldest first."""
    with store.read() as connection:
        return _select(connection)


def find_key(store: Store, id_or_name: str) -> KeyInfo:
    """Return the key with this id, or the key that is not revoked with this name. Raises ConfigError."""
    with store.read() as connection:
        return _find(connection, id_or_name)


def revoke_key(store: Store, id_or_name: str, actor: str) -> KeyInfo:
    """Revoke a key forever and return it. Its open answers end within a second."""
    with store.write(durable=True) as connection:
        info = _find(connection, id_or_name)
        if info.revoked_ms is None:
            info = _change(connection, actor, "revoke key", info, revoked_ms=now_ms())
        return info


def change_key(
    store: Store,
    id_or_name: str,
    changes: Mapping[str, Any],
    actor: str,
    currency: str = "",
    expires_ms: int | EllipsisType | None = ...,
) -> KeyInfo:
    """Change fields of a key's policy and return the key. Open requests keep what they were admitted with.

    ``currency`` is the currency of budgets in money. ``expires_ms`` is the new end, None for never, and by
    default the old one. Raises ConfigError for a key that was revoked or an end in the past, and ValueError
    for a policy that is malformed.
    """
    with store.write(durable=True) as connection:
        info = _find_valid(connection, id_or_name)
        policy = KeyPolicy.model_validate({**info.policy.model_dump(), **changes})
        if currency:
            choose_currency(connection, currency)
        expires = info.expires_ms if expires_ms is ... else _checked_end(info.name, expires_ms)
        values = {"policy": policy.model_dump(mode="json"), "expires_ms": expires}
        return _change(connection, actor, "change key", info, **values)


def rotate_key(store: Store, id_or_name: str, actor: str) -> tuple[KeyInfo, str]:
    """Give a key a new secret and return it with its new text. The old text stops working at once."""
    secret = _new_secret()
    with store.write(durable=True) as connection:
        info = _find_valid(connection, id_or_name)
        return _change(connection, actor, "rotate key", info, digest=_digest(secret)), _token(info.id, secret)


def has_keys(store: Store) -> bool:
    """Return whether any key was ever created."""
    with store.read() as connection:
        return connection.execute(sql.select(keys.c.id).limit(1)).first() is not None


def first_admin_key(store: Store, actor: str) -> str | None:
    """Create an administrator's key in a store that never had a key, and return its text. Otherwise None."""
    if has_keys(store):
        return None
    return create_key(store, "admin", KeyPolicy(scopes=frozenset(SCOPES)), actor=actor)[1]


def verify_token(store: Store, token: str) -> tuple[KeyInfo, int] | None:
    """Return the key of a text and the version of all keys, or None for a text that is not a key's.

    The key may be revoked or expired. It is found by its id. The digest of the secret is then compared in
    constant time. If there is no such id, it is compared with a digest that fits nothing.
    """
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    with store.read() as connection:
        row = connection.execute(_KEY_AND_VERSION, {"key_id": match[1]}).first()
    right = hmac.compare_digest(_digest(match[2]), _NO_KEY_DIGEST if row is None else row.digest)
    return (_info(row), row.keys_version) if row is not None and right else None


def key_by_id(connection: sql.Connection, id_: str) -> KeyInfo | None:
    """Return a key and lock its row until the end of the transaction, or None."""
    row = connection.execute(_LOCKED_KEY, {"key_id": id_}).first()
    return None if row is None else _info(row)


def parse_budget(text: str) -> tuple[TokenBudget, str]:
    """Return a budget such as ``500000 tokens/day`` or ``20 EUR/month``, and its currency ("" for tokens)."""
    match = re.fullmatch(r"\s*([^\s/A-Za-z]+)\s*([^\s/]+)\s*/\s*(\S+)\s*", text)
    if match is None:
        raise ConfigError(f"budget {text!r}: write e.g. '500000 tokens/day' or '20 EUR/month'")
    amount, unit, per = match[1].replace("_", ""), match[2].upper(), match[3].lower()
    if per not in ("day", "month"):
        raise ConfigError(f"budget {text!r}: the period {match[3]!r} must be day or month")
    period: Literal["day", "month"] = "day" if per == "day" else "month"
    if unit in ("TOKEN", "TOKENS"):
        if not amount.isdecimal() or len(amount) > 15:
            raise ConfigError(f"budget {text!r}: {match[1]!r} must be a whole number below 10^15 of tokens")
        return TokenBudget(unit="tokens", period=period, amount=int(amount)), ""
    if not re.fullmatch("[A-Z]{3}", unit):
        raise ConfigError(
            f"budget {text!r}: {match[2]!r} must be tokens or a currency's three letters, e.g. EUR"
        )
    return TokenBudget(unit="money", period=period, amount=parse_money(amount)), unit


def _checked_end(name: str, expires_ms: int | None) -> int | None:
    if expires_ms is not None and expires_ms <= now_ms():
        raise ConfigError(f"key {name}: it would already have expired; choose a later time")
    return expires_ms


def _new_secret() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_SECRET_LENGTH))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _token(id_: str, secret: str) -> str:
    return f"herd-{id_}-{secret}"


def _info(row: sql.Row) -> KeyInfo:
    policy = KeyPolicy.model_validate(row.policy)
    return KeyInfo(row.id, row.name, row.digest, policy, row.created_ms, row.expires_ms, row.revoked_ms)


def _select(connection: sql.Connection) -> list[KeyInfo]:
    return [_info(row) for row in connection.execute(sql.select(keys).order_by(keys.c.created_ms, keys.c.id))]


def _find(connection: sql.Connection, id_or_name: str) -> KeyInfo:
    same = [info for info in _select(connection) if id_or_name in (info.id, info.name)]
    for info in sorted(same, key=lambda info: (info.id != id_or_name, info.revoked_ms is not None)):
        return info
    raise ConfigError(f"key {id_or_name!r}: no key has this id or name; see them with: herd keys list")


def _find_valid(connection: sql.Connection, id_or_name: str) -> KeyInfo:
    """Return the key to change. Raises ConfigError if it was revoked."""
    info = _find(connection, id_or_name)
    if info.revoked_ms is not None:
        raise ConfigError(f"key {info.id}: was revoked; create a new key")
    return info


def _change(connection: sql.Connection, actor: str, act: str, info: KeyInfo, **values: Any) -> KeyInfo:
    """Store new values of a key's columns, and return the changed key."""
    connection.execute(keys.update().where(keys.c.id == info.id).values(values))
    _changed(connection, actor, act, info)
    return _find(connection, info.id)


def _changed(connection: sql.Connection, actor: str, act: str, info: KeyInfo) -> None:
    """Note a change of a key, so that running servers read the keys again."""
    connection.execute(meta.update().values(keys_version=meta.c.keys_version + 1))
    record(connection, actor, act, info.id, name=info.name)
