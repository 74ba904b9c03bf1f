"""Dollars of a run: rented by the hour, or bought and worn off, with the power it draws.

A bought machine costs its price spread over `YEARS`, and its watts. Prices are those of ``machines.yaml``, with their date;
where a device has none, there is none here.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machines import Machine, Price

YEARS = 4.0
"""Years over which a bought accelerator is written off."""
KWH = 0.10
"""USD a kilowatt-hour, industrial rate."""
OVERHEAD = 1.25
"""Watts drawn in all for each watt of the accelerator: its host, network and cooling."""


@dataclass(frozen=True)
class Money:
    """USD for some hours on a whole machine, with the prices they come from (None where no price is known)."""

    rent: float | None
    rent_price: Price | None
    own: float | None  # the purchase worn off over its years, and power
    buy: float | None  # the whole purchase
    buy_price: Price | None
    energy_kwh: float


def money(machine: Machine, hours: float, usd_per_hour: float | None = None) -> Money:
    """Dollars of ``hours`` on all devices; ``usd_per_hour`` of one device replaces the catalogue's newest rent."""
    rent = Price(usd_per_hour, "", "given") if usd_per_hour is not None else next(iter(machine.rent), None)
    buy = next(iter(machine.buy), None)
    energy = machine.count * machine.device.power * OVERHEAD * hours / 1000
    worn = None if buy is None else buy.usd * machine.count * hours / (YEARS * 365.25 * 24)
    return Money(
        rent=None if rent is None else rent.usd * machine.count * hours,
        rent_price=rent,
        own=None if worn is None else worn + energy * KWH,
        buy=None if buy is None else buy.usd * machine.count,
        buy_price=buy,
        energy_kwh=energy,
    )
