"""The ledger's SQL statements, which are made once: to make one costs ten times more than to run it.

Their parameters are bound by name, so no text of a client is ever part of a statement.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from sqlalchemy import bindparam

from .tables import days, keys, requests
from .usage import day_of

_SUMS = [column.name for column in days.c if column.name not in ("key_id", "day", "model")]
_KEY, _ID = requests.c.key_id == bindparam("key_id"), requests.c.id == bindparam("id")
_OPEN = requests.c.status == "open"
STEP_MARK = "#"
"""What follows the endpoint in the rows of later steps of a request that runs tools on the server."""
IS_FIRST_STEP = requests.c.endpoint.not_like(f"%{STEP_MARK}%")
_RECENT = sql.and_(_KEY, requests.c.created_ms.between(bindparam("first"), bindparam("last")))

LOCK_KEY = sql.select(keys.c.id).where(keys.c.id == bindparam("key_id")).with_for_update()
INSERT_REQUEST = requests.insert()
SAME_ID = sql.select(requests.c.status, requests.c.prompt_tokens).where(_KEY, _ID)
FORGET_REQUEST = requests.delete().where(_KEY, _ID)
COUNT_OPEN = sql.select(sql.func.count()).where(_OPEN, _KEY, IS_FIRST_STEP)
SUM_RECENT = sql.select(
    sql.func.coalesce(sql.func.sum(sql.case((IS_FIRST_STEP, 1), else_=0)), 0),
    sql.func.coalesce(sql.func.sum(requests.c.tokens), 0),
).where(_RECENT)
RECENT_BY_AGE = (
    sql.select(requests.c.created_ms, requests.c.tokens).where(_RECENT).order_by(requests.c.created_ms)
)
OPEN_REQUEST = sql.select(requests).where(
    _KEY, _ID, _OPEN, requests.c.server == bindparam("server"), requests.c.slot == bindparam("slot")
)
CHANGE_REQUEST = requests.update().where(
    requests.c.key_id == bindparam("at_key"), requests.c.id == bindparam("at_id")
)
_CHANGE_DAY = (
    days.update()
    .where(
        days.c.key_id == bindparam("at_key"),
        days.c.day == bindparam("at_day"),
        days.c.model == bindparam("at_model"),
    )
    .values({name: days.c[name] + bindparam(f"add_{name}") for name in _SUMS})
)
_INSERT_DAY = days.insert()
_SPENT = sql.select(
    *(
        sql.func.coalesce(sql.func.sum(amount), 0)
        for amount in (
            days.c.prompt_tokens + days.c.completion_tokens,
            days.c.reserved_tokens,
            days.c.money,
            days.c.reserved_money,
        )
    )
).where(days.c.key_id == bindparam("key_id"), days.c.day.between(bindparam("first"), bindparam("last")))


def add_to_day(
    connection: sql.Connection, key_id: str, day: str, model: str, amounts: dict[str, Any]
) -> None:
    """Add to the sums of a key, day and model. The key is locked, so no other transaction adds the row."""
    where = {"at_key": key_id, "at_day": day, "at_model": model}
    added = {f"add_{name}": amounts.get(name, 0) for name in _SUMS}
    if connection.execute(_CHANGE_DAY, where | added).rowcount == 0:
        row = {"key_id": key_id, "day": day, "model": model} | {name: amounts.get(name, 0) for name in _SUMS}
        connection.execute(_INSERT_DAY, row)


def spent(connection: sql.Connection, key_id: str, unit: str, period: str, at_ms: int) -> tuple[int, int]:
    """Return a key's used and reserved amounts of ``unit`` (tokens, money) in the day or month of a time."""
    day = day_of(at_ms)
    first, last = (day, day) if period == "day" else (f"{day[:8]}01", f"{day[:8]}31")
    sums = connection.execute(_SPENT, {"key_id": key_id, "first": first, "last": last}).one()
    used, reserved = sums[:2] if unit == "tokens" else sums[2:]
    return int(used), int(reserved)
