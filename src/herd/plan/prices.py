"""What tokens cost: others' prices, one's own machine's, and the volume from which one's own is cheaper.

Prices of APIs are data with dates (``prices.yaml``). One's own machine costs money by the hour whether it
works or not: rent, or the purchase spread over its life, and electricity while it works. A million tokens
then cost

    hours a million tokens take · USD an hour

and input is cheaper than output by as much as prefill is faster than decode. *Blended* is three parts input
to one part output, as Artificial Analysis counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..report.published import read_yaml

BLEND_INPUT = 3
"""Input tokens for each output token in a blended price."""
LIFE_HOURS = 3 * 8766
"""Hours over which a purchase is spread: three years."""
USD_PER_KWH = 0.15
HOURS_PER_MONTH = 8766 / 12


def blend(input_usd: float, output_usd: float) -> float:
    """One price for tokens in and out, 3:1."""
    return (BLEND_INPUT * input_usd + output_usd) / (BLEND_INPUT + 1)


@dataclass(frozen=True)
class ApiPrice:
    """USD for a million tokens in and out, of one model at one host."""

    model: str
    host: str
    input: float
    output: float
    date: str
    source: str

    @property
    def blended(self) -> float:
        return blend(self.input, self.output)


@functools.cache
def all_offers() -> tuple[ApiPrice, ...]:
    """The whole catalogue, in the order of the file."""
    rows = read_yaml("herd.plan", "prices.yaml")["prices"]
    return tuple(
        ApiPrice(row["model"], row["host"], row["in"], row["out"], str(row["date"]), row["source"])
        for row in rows
    )


def offers_for(model: str) -> list[ApiPrice]:
    """Every host's price of a model, cheapest first."""
    return sorted((price for price in all_offers() if price.model == model), key=lambda price: price.blended)


@dataclass(frozen=True)
class OwnCost:
    """USD of a million tokens on one's own machine that does nothing else; ``per_hour`` is what it costs
    working, ``fixed_per_hour`` what it costs anyway."""

    per_hour: float
    fixed_per_hour: float
    input: float
    output: float

    @property
    def blended(self) -> float:
        return blend(self.input, self.output)


def hourly(purchase_usd: float | None, rent_usd: float | None, watts: float) -> tuple[float, float]:
    """(fixed, working) USD an hour: rent, or the purchase over its life; electricity only where it is not
    rented."""
    if rent_usd is not None:
        return rent_usd, rent_usd
    fixed = (purchase_usd or 0.0) / LIFE_HOURS
    return fixed, fixed + watts / 1000 * USD_PER_KWH


def own_cost(
    input_rate: float, output_rate: float, fixed_per_hour: float, working_per_hour: float
) -> OwnCost:
    """Cost at full use, from tokens/s of prefill and of decode (all streams together)."""

    def million(rate: float) -> float:
        return 1e6 / rate / 3600 * working_per_hour

    return OwnCost(working_per_hour, fixed_per_hour, million(input_rate), million(output_rate))


@dataclass(frozen=True)
class BreakEven:
    """Blended tokens a month from which one's own machine is cheaper than ``api``, and the most it can make a
    month. ``tokens`` None: never, because working alone costs it more than the API asks."""

    api: ApiPrice
    tokens: float | None
    capacity: float

    @property
    def reachable(self) -> bool:
        return self.tokens is not None and self.tokens <= self.capacity


def break_even(own: OwnCost, api: ApiPrice) -> BreakEven:
    """Fixed cost of a month over what each token saves; a token's own cost is the electricity it takes."""
    hours_per_million = own.blended / own.per_hour
    energy = hours_per_million * (own.per_hour - own.fixed_per_hour)  # USD a million blended tokens
    capacity = HOURS_PER_MONTH / hours_per_million * 1e6
    saved = api.blended - energy
    tokens = own.fixed_per_hour * HOURS_PER_MONTH / saved * 1e6 if saved > 0 else None
    return BreakEven(api, tokens, capacity)
