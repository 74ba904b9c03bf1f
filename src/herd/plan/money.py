"""Cost of a training run on a machine that is rented by the hour, or bought and supplied with power.

Prices of devices are in ``machines.yaml``, with their dates. A cost is None if the device has no price.
`prices.hourly_cost` spreads a purchase over the life of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machines import Machine, Price
from .prices import hourly_cost

OVERHEAD = 1.25
"""Total watts per watt of an accelerator, including host, network and cooling."""


@dataclass(frozen=True)
class Money:
    """Cost in USD of some hours on a whole machine, with the prices used, or None where no price is known."""

    rent: float | None
    rent_price: Price | None
    own: float | None  # the purchase price spread over the machine's life, plus power
    buy: float | None  # the whole purchase price
    buy_price: Price | None
    energy_kwh: float


def run_cost(machine: Machine, hours: float, usd_per_hour: float | None = None) -> Money:
    """Return the cost of ``hours`` on all devices. ``usd_per_hour`` replaces the known rent of one device."""
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
