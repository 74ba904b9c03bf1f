"""Cost of tokens at APIs and on one's own machine, and the volume from which one's own machine is cheaper.

Prices of APIs are data with dates (``prices.yaml``). One's own machine costs money per hour: the rent, or the
purchase price spread over the machine's life plus electricity under load. A million tokens then cost

    hours per million tokens · USD per hour

and input is cheaper than output by the factor by which prefill is faster than decode. A *blended* price is
three parts input and one part output, as defined by Artificial Analysis.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..package_yaml import package_yaml

BLEND_INPUT = 3
"""Input tokens per output token in a blended price."""
LIFE_HOURS = 3 * 8766
"""Hours over which a purchase is spread: three years."""
USD_PER_KWH = 0.15
HOURS_PER_MONTH = 8766 / 12


def blend(input_usd: float, output_usd: float) -> float:
    """Return the blended price (3:1) of input and output tokens."""
    return (BLEND_INPUT * input_usd + output_usd) / (BLEND_INPUT + 1)


@dataclass(frozen=True)
class ApiPrice:
    """Price of one model at one host, in USD per million input and output tokens."""

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
    """Return the whole price list, in the order of the file."""
    return tuple(
        ApiPrice(row["model"], row["host"], row["in"], row["out"], str(row["date"]), row["source"])
        for row in package_yaml(__package__, "prices.yaml")["prices"]
    )


def offers_for(model: str) -> list[ApiPrice]:
    """Return every host's price of a model, cheapest first."""
    return sorted((offer for offer in all_offers() if offer.model == model), key=lambda offer: offer.blended)


@dataclass(frozen=True)
class OwnCost:
    """Cost in USD per million tokens on one's own machine at full load.

    ``per_hour`` is the machine's cost per hour under load, ``fixed_per_hour`` the part that it costs also
    when idle.
    """

    per_hour: float
    fixed_per_hour: float
    input: float
    output: float

    @property
    def blended(self) -> float:
        return blend(self.input, self.output)


def hourly_cost(purchase_usd: float | None, rent_usd: float | None, watts: float) -> tuple[float, float]:
    """Return USD per hour, idle and under load: the rent, or the spread purchase price plus electricity."""
    if rent_usd is not None:
        return rent_usd, rent_usd
    fixed = (purchase_usd or 0.0) / LIFE_HOURS
    return fixed, fixed + watts / 1000 * USD_PER_KWH


def own_cost(input_rate: float, output_rate: float, fixed: float, working: float) -> OwnCost:
    """Return the cost at full load, from tokens/s of prefill and of decode (all sequences together)."""
    usd_at_one_token_per_s = 1e6 / 3600 * working
    return OwnCost(working, fixed, usd_at_one_token_per_s / input_rate, usd_at_one_token_per_s / output_rate)


@dataclass(frozen=True)
class BreakEven:
    """The volume from which one's own machine is cheaper than ``api``, in blended tokens per month.

    ``capacity`` is the most that the machine can generate in a month. ``tokens`` is None if it is never
    cheaper, because the electricity alone costs more than the API.
    """

    api: ApiPrice
    tokens: float | None
    capacity: float

    @property
    def reachable(self) -> bool:
        return self.tokens is not None and self.tokens <= self.capacity


def break_even(own: OwnCost, api: ApiPrice) -> BreakEven:
    """Return the break-even volume: the fixed cost per month divided by the saving per token.

    The saving is the price at the API minus the electricity for a token.
    """
    hours_per_million = own.blended / own.per_hour
    energy = hours_per_million * (own.per_hour - own.fixed_per_hour)  # USD per million blended tokens
    capacity = HOURS_PER_MONTH / hours_per_million * 1e6
    saved = api.blended - energy
    tokens = own.fixed_per_hour * HOURS_PER_MONTH / saved * 1e6 if saved > 0 else None
    return BreakEven(api, tokens, capacity)
