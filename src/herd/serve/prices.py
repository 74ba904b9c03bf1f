"""Money in whole millionths of one currency, and the price of tokens by model."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation

import sqlalchemy as sql

from ..errors import ConfigError
from .store import Store, record
from .tables import meta, prices

MICRO = 1_000_000
ANY_MODEL = "*"
"""Name under which the price of all models without their own price is stored."""
_PRICE = sql.select(prices).where(
    sql.or_(prices.c.model == sql.bindparam("model"), prices.c.model == ANY_MODEL)
)


@dataclass(frozen=True)
class TokenPrice:
    """Prices in millionths of the currency for a million tokens: new prompt, cached prompt, completion."""

    prompt: int
    cached: int
    completion: int

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """Return the money for a request, rounded up to 1e-6. ``prompt_tokens`` include cached ones."""
        total = (
            (prompt_tokens - cached_tokens) * self.prompt
            + cached_tokens * self.cached
            + completion_tokens * self.completion
        )
        return -(-total // MICRO)

    def worst_cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Return the most that a request with these tokens can cost, whatever part of them is cached."""
        cached = prompt_tokens if self.cached > self.prompt else 0
        return self.cost(prompt_tokens, cached, completion_tokens)


FREE = TokenPrice(0, 0, 0)


def parse_money(text: str) -> int:
    """Return an amount such as ``0.15`` in millionths. Refuses what would have to be rounded."""
    try:
        amount = Decimal(text.strip()) * MICRO
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0 or amount > 10**15 or amount != int(amount):
        raise ConfigError(f"{text!r} is not an amount of money: use at most six decimals, e.g. 0.15")
    return int(amount)


def format_money(micro: int) -> str:
    """Return an amount with two to six decimals, e.g. ``0.15``."""
    whole, fraction = divmod(abs(micro), MICRO)
    return f"{'-' if micro < 0 else ''}{whole}.{f'{fraction:06d}'.rstrip('0').ljust(2, '0')}"


def set_price(store: Store, model: str, price: TokenPrice, currency: str, actor: str) -> None:
    """Set the price of a model, or of `ANY_MODEL`. Open requests keep the price they began with."""
    if not model or len(model) > 256 or not model.isprintable():
        raise ConfigError(f"{model!r} is not the name of a model")
    with store.write(durable=True) as connection:
        choose_currency(connection, currency)
        connection.execute(prices.delete().where(prices.c.model == model))
        connection.execute(prices.insert().values(model=model, **asdict(price)))
        record(connection, actor, "set price", model, **asdict(price), currency=currency)


def choose_currency(connection: sql.Connection, currency: str) -> None:
    """Make ``currency`` the store's one currency, or raise ConfigError if it has another one."""
    if not re.fullmatch("[A-Z]{3}", currency):
        raise ConfigError(f"currency {currency!r}: use its three letters, e.g. EUR")
    present = read_currency(connection)
    if present not in (None, currency):
        raise ConfigError(f"currency {currency}: this store counts in {present}; use one currency in a store")
    connection.execute(meta.update().values(currency=currency))


def read_currency(connection: sql.Connection) -> str | None:
    """Return the currency of the store, or None if none was chosen."""
    currency: str | None = connection.execute(sql.select(meta.c.currency)).scalar_one()
    return currency


def read_prices(store: Store) -> tuple[dict[str, TokenPrice], str | None]:
    """Return the price of every model that has one, and the currency."""
    with store.read() as connection:
        rows = connection.execute(sql.select(prices).order_by(prices.c.model)).all()
        currency = read_currency(connection)
    return {row.model: TokenPrice(row.prompt, row.cached, row.completion) for row in rows}, currency


def price_of(connection: sql.Connection, model: str) -> TokenPrice | None:
    """Return the price of a model, the price for any model, or None."""
    rows = {row.model: row for row in connection.execute(_PRICE, {"model": model})}
    row = rows.get(model) or rows.get(ANY_MODEL)
    return None if row is None else TokenPrice(row.prompt, row.cached, row.completion)
