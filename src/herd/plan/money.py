"""Dollars of a run on a machine: rented by the hour, or bought, worn off and fed with power.

Prices of devices are those of ``machines.yaml``, with their date; where a device has none, there is none
here. How a purchase is spread over its life is `prices.hourly`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError
from .machines import Machine, Price
from .prices import hourly

OVERHEAD = 1.25
"""Watts drawn in all for each watt of an accelerator: its host, network and cooling."""


@dataclass(frozen=True)
class Money:
    """USD for some hours on a whole machine, with the prices they come from (None where no price is
    known)."""

    rent: float | None
    rent_price: Price | None
    own: float | None  # the purchase spread over its life, and power
    buy: float | None  # the whole purchase
    buy_price: Price | None
    energy_kwh: float


def money(machine: Machine, hours: float, usd_per_hour: float | None = None) -> Money:
    """Dollars of ``hours`` on all devices; ``usd_per_hour`` of one device replaces the catalogue's newest
    rent."""
    if usd_per_hour is not None and not 0 < usd_per_hour < float("inf"):
        raise PlanError(f"usd-per-hour={usd_per_hour:g} must be positive")
    rent = Price(usd_per_hour, "", "given") if usd_per_hour is not None else next(iter(machine.rent), None)
    buy = next(iter(machine.buy), None)
    watts = machine.device.power * OVERHEAD
    return Money(
        rent=None if rent is None else rent.usd * machine.count * hours,
        rent_price=rent,
        own=None if buy is None else hourly(buy.usd, None, watts)[1] * machine.count * hours,
        buy=None if buy is None else buy.usd * machine.count,
        buy_price=buy,
        energy_kwh=machine.count * watts * hours / 1000,
    )
