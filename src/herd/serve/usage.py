"""Usage by day, key and model, as rows and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime

import sqlalchemy as sql

from ..errors import ConfigError
from .prices import format_money
from .store import Store
from .tables import days, keys


@dataclass(frozen=True)
class DayUsage:
    """What one key used of one model on one day of UTC. Money is in millionths of the currency.

    ``requests`` are billed ones. ``prompt_tokens`` include ``cached_tokens``. The reserved amounts belong to
    requests that are still open.
    """

    day: str
    key_id: str
    key_name: str
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    money: int
    reserved_tokens: int
    reserved_money: int


def day_of(at_ms: int) -> str:
    """Return the day of a time, in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d")


def read_usage(
    store: Store, *, since: str | None = None, until: str | None = None, key_id: str | None = None
) -> list[DayUsage]:
    """Return usage from day ``since`` to day ``until``, both included, ordered by day, key and model."""
    names = [field.name for field in fields(DayUsage)]
    columns = [keys.c.name if name == "key_name" else days.c[name] for name in names]
    query = sql.select(*columns).join(keys, keys.c.id == days.c.key_id)
    if since is not None:
        query = query.where(days.c.day >= _checked_day(since))
    if until is not None:
        query = query.where(days.c.day <= _checked_day(until))
    if key_id is not None:
        query = query.where(days.c.key_id == key_id)
    with store.read() as connection:
        rows = connection.execute(query.order_by(days.c.day, days.c.key_id, days.c.model)).all()
    return [DayUsage(*row) for row in rows]


def usage_csv(rows: Sequence[DayUsage], currency: str | None) -> str:
    """Return usage as CSV with a header. No cell begins like a formula of a spreadsheet."""
    names = [field.name for field in fields(DayUsage)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([*names, "currency"])
    for row in rows:
        cells = asdict(row) | {name: format_money(getattr(row, name)) for name in ("money", "reserved_money")}
        writer.writerow([_safe_cell(str(cells[name])) for name in names] + [currency or ""])
    return out.getvalue()


def _checked_day(day: str) -> str:
    with suppress(ValueError):
        if date.fromisoformat(day).isoformat() == day:
            return day
    raise ConfigError(f"day {day!r}: write it like 2026-11-27")


def _safe_cell(text: str) -> str:
    """Return a cell's text on one line, with a quote before what a spreadsheet would take for a formula."""
    text = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", " ", text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
