"""The limits of a key that a request must keep to be admitted: open requests, rates per minute, and budgets.

The checks run in the ledger's transaction, which has locked the key. So two requests that arrive together
cannot both use what is left of a limit.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import sqlalchemy as sql

from .errors import BudgetExceeded, RateLimited, TooManyConcurrent
from .keys import KeyInfo, TokenBudget
from .prices import TokenPrice, format_money
from .statements import COUNT_OPEN, IS_FIRST_STEP, RECENT_BY_AGE, SUM_RECENT, spent
from .tables import meta

MINUTE_MS = 60_000


def check_rates(
    connection: sql.Connection, info: KeyInfo, tokens: int, now: int, *, is_first_step: bool
) -> None:
    """Raise if the key has too many requests open, or too many requests or tokens within the last minute."""
    policy = info.policy
    if policy.concurrent is not None and is_first_step:
        n_open = connection.execute(COUNT_OPEN, {"key_id": info.id}).scalar_one()
        if n_open >= policy.concurrent:
            raise TooManyConcurrent(f"this key may have {policy.concurrent} requests open at a time")
    if policy.requests_per_minute is None and policy.tokens_per_minute is None:
        return
    # After the clock was set back there are requests from the future. They count for a minute at most.
    window = {"key_id": info.id, "first": now - MINUTE_MS + 1, "last": now + MINUTE_MS}
    count, used = connection.execute(SUM_RECENT, window).one()
    limit = policy.requests_per_minute
    if limit is not None and count >= limit and is_first_step:
        oldest_first = connection.execute(RECENT_BY_AGE.where(IS_FIRST_STEP), window).all()
        blocking = oldest_first[count - limit]  # once it is a minute old, fewer than ``limit`` are left
        wait = _seconds_left(blocking.created_ms, now)
        raise RateLimited(f"this key may send {limit} requests per minute", retry_after=wait)
    limit = policy.tokens_per_minute
    if limit is None or (excess := int(used) + tokens - limit) <= 0:
        return
    for row in connection.execute(RECENT_BY_AGE, window):
        excess -= row.tokens
        if excess <= 0:
            wait = _seconds_left(row.created_ms, now)
            raise RateLimited(f"this key may use {limit} tokens per minute", retry_after=wait)
    raise RateLimited(
        f"this request may use {tokens} tokens, and the key {limit} per minute: lower max_tokens"
    )


def check_budgets(
    connection: sql.Connection,
    info: KeyInfo,
    model: str,
    price: TokenPrice | None,
    tokens: int,
    money: int,
    now: int,
) -> None:
    """Raise `BudgetExceeded` if a request of at most ``tokens`` and ``money`` exceeds the rest of a budget.

    ``price`` is the model's, or None if it has none.
    """
    for budget in info.policy.budgets:
        if budget.unit == "money" and price is None:
            raise BudgetExceeded(
                f"this key has a budget in money, and the model {model!r} has no price; "
                "the operator sets it with: herd keys price"
            )
        _check_budget(connection, info, budget, tokens if budget.unit == "tokens" else money, now)


def _check_budget(
    connection: sql.Connection, info: KeyInfo, budget: TokenBudget, worst: int, now: int
) -> None:
    used, reserved = spent(connection, info.id, budget.unit, budget.period, now)
    left = budget.amount - used - reserved
    if worst <= left:
        return
    currency = connection.execute(sql.select(meta.c.currency)).scalar_one() or ""

    def show(amount: int) -> str:
        return f"{amount} tokens" if budget.unit == "tokens" else f"{format_money(amount)} {currency}".strip()

    open_part = f", {show(reserved)} are reserved by open requests" if reserved else ""
    raise BudgetExceeded(
        f"the budget of {show(budget.amount)} per {budget.period} has {show(max(left, 0))} left{open_part}, "
        f"and this request may use {show(worst)}: lower max_tokens, or wait until {_next_period(budget, now)}"
    )


def _next_period(budget: TokenBudget, now: int) -> str:
    """Return the time at which a budget starts again."""
    today = datetime.fromtimestamp(now / 1000, UTC).date()
    tomorrow, next_month = today + timedelta(days=1), today.replace(day=1) + timedelta(days=32)
    return f"{tomorrow if budget.period == 'day' else next_month.replace(day=1)} 00:00 UTC"


def _seconds_left(created_ms: int, now: int) -> float:
    """Return the seconds until a request no longer counts towards the limits per minute."""
    return max(created_ms + MINUTE_MS - now, 1) / 1000
