"""Dollars of a training run on a machine: rented by the hour, or bought, written off and supplied with power.

Prices of devices are those of ``machines.yaml``, with their dates. Where a device has no price, the result
has none. `prices.hourly_cost` spreads a purchase over its life.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machines import Machine, Price
from .prices import hourly_cost

OVERHEAD = 1.25
"""Total watts per watt of an accelerator: its host, network and cooling included."""


@dataclass(frozen=True)
class Money:
    """USD for some hours on a whole machine, with the prices; None where no price is known."""

    rent: float | None
    rent_price: Price | None
    own: float | None  # the purchase, spread over its life, and power
    buy: float | None  # the whole purchase
    buy_price: Price | None
    energy_kwh: float


def run_cost(machine: Machine, hours: float, usd_per_hour: float | None = None) -> Money:
    """Return the cost of ``hours`` on all devices; ``usd_per_hour`` replaces the rent of one device."""
    rent = Price(usd_per_hour, "", "given") if usd_per_hour is not None else next(iter(machine.rent), None)
    buy = next(iter(machine.buy), None)
    watts = machine.device.power * OVERHEAD
    return Money(
        rent=None if rent is None else rent.usd * machine.count * hours,
        rent_price=rent,
        own=None if buy is None else hourly_cost(buy.usd, None, watts)[1] * machine.count * hours,
        buy=None if buy is None else buy.usd * machine.count,
        buy_price=buy,
        energy_kwh=machine.count * watts * hours / 1000,
    )
