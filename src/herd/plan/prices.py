"""What tokens cost: at APIs, on one's own machine, and from which volume one's own is cheaper.

Prices of APIs are data with dates (``prices.yaml``). One's own machine costs money by the hour: its rent, or
the purchase spread over its life plus electricity while it works. A million tokens then cost

    hours per million tokens · USD per hour

and input is cheaper than output by as much as prefill is faster than decode. A *blended* price is three parts
input to one part output, as Artificial Analysis counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..report.published import read_yaml

BLEND_INPUT = 3
"""Input tokens per output token in a blended price."""
LIFE_HOURS = 3 * 8766
"""Hours over which a purchase is spread: three years."""
USD_PER_KWH = 0.15
HOURS_PER_MONTH = 8766 / 12


def blend(input_usd: float, output_usd: float) -> float:
    """Return one price for tokens in and out, 3:1."""
    return (BLEND_INPUT * input_usd + output_usd) / (BLEND_INPUT + 1)


@dataclass(frozen=True)
class ApiPrice:
    """USD per million tokens in and out, of one model at one host."""

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
        for row in read_yaml("herd.plan", "prices.yaml")["prices"]
    )


def offers_for(model: str) -> list[ApiPrice]:
    """Return every host's price of a model, cheapest first."""
    return sorted((offer for offer in all_offers() if offer.model == model), key=lambda offer: offer.blended)


@dataclass(frozen=True)
class OwnCost:
    """USD per million tokens on one's own machine at full use.

    ``per_hour`` is what the machine costs while it works, ``fixed_per_hour`` what it costs in any case.
    """

    per_hour: float
    fixed_per_hour: float
    input: float
    output: float

    @property
    def blended(self) -> float:
        return blend(self.input, self.output)


def hourly_cost(purchase_usd: float | None, rent_usd: float | None, watts: float) -> tuple[float, float]:
    """Return (fixed, working) USD per hour: the rent, or the purchase over its life plus electricity."""
    if rent_usd is not None:
        return rent_usd, rent_usd
    fixed = (purchase_usd or 0.0) / LIFE_HOURS
    return fixed, fixed + watts / 1000 * USD_PER_KWH


def own_cost(input_rate: float, output_rate: float, fixed: float, working: float) -> OwnCost:
    """Return the cost at full use, from tokens/s of prefill and of decode (all sequences together)."""
    usd_at_one_token_per_s = 1e6 / 3600 * working
    return OwnCost(working, fixed, usd_at_one_token_per_s / input_rate, usd_at_one_token_per_s / output_rate)


@dataclass(frozen=True)
class BreakEven:
    """The volume from which one's own machine is cheaper than ``api``, in blended tokens per month.

    ``capacity`` is the most that the machine makes in a month. ``tokens`` is None where it is never cheaper,
    because the electricity alone costs more than the API.
    """

    api: ApiPrice
    tokens: float | None
    capacity: float

    @property
    def reachable(self) -> bool:
        return self.tokens is not None and self.tokens <= self.capacity


def break_even(own: OwnCost, api: ApiPrice) -> BreakEven:
    """Return the fixed cost of a month over what each token saves; a token's own cost is its electricity."""
    hours_per_million = own.blended / own.per_hour
    energy = hours_per_million * (own.per_hour - own.fixed_per_hour)  # USD per million blended tokens
    capacity = HOURS_PER_MONTH / hours_per_million * 1e6
    saved = api.blended - energy
    tokens = own.fixed_per_hour * HOURS_PER_MONTH / saved * 1e6 if saved > 0 else None
    return BreakEven(api, tokens, capacity)
