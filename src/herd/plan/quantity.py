"""Parse numbers as people write them: ``15.6T`` tokens, a context of ``32k``, ``1e12``, ``500ms``.

Every numeric option of the planner's verbs is a `Quantity`. The command line calls it with the option's text.
It accepts finite numbers within its bounds and refuses everything else with one line that names the option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from ..errors import PlanError

COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
CONTEXT = {"": 1, "k": 2**10, "m": 2**20}
"""Suffixes of contexts and batches: 32k means 32,768 and 16M means 16 · 2^20."""
SECONDS = {"": Decimal(1), "ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)}


@dataclass(frozen=True)
class Quantity:
    """A kind of number: bounds, suffixes, and an example for error messages."""

    least: float
    most: float
    suffixes: Mapping[str, int | Decimal]
    example: str
    whole: bool = False

    def parse(self, text: str, option: str) -> float:
        """Return the number that ``text`` means. Raises `PlanError` that names the option."""
        match = re.fullmatch(
            # a comma groups thousands: "15,6T" may mean 15.6T and must not become 156T
            r"([+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)\.?\d*|\.\d+)(?:e[+-]?\d{1,4})?)\s*([a-z]*)",
            text.strip().lower(),
        )
        if not match or match[2] not in self.suffixes:
            raise PlanError(f"{option} {text!r} is not a number: write it like {self.example}")
        value = Decimal(re.sub("[,_]", "", match[1])) * self.suffixes[match[2]]
        if not Decimal(self.least) <= value <= Decimal(self.most):
            raise PlanError(f"{option} {text!r} is out of range: give {self.least:,g} to {self.most:,g}")
        if self.whole and value != int(value):
            raise PlanError(f"{option} {text!r} must be a whole number")
        return int(value) if self.whole else float(value)


def whole(most: float, suffixes: Mapping[str, int] = COUNT, example: str = "2") -> Quantity:
    """Return a kind of whole number of at least 1."""
    return Quantity(1, most, suffixes, example, whole=True)


USD = Quantity(0.001, 1e15, COUNT, "2.50")
"""An amount of US dollars, from a tenth of a cent to a quadrillion."""
TIME = Quantity(0.0, 366 * 86_400, SECONDS, "1s, 500ms or 2min")
"""A time in seconds, up to a year."""
