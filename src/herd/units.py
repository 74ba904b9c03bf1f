"""Format numbers for readers: few digits, a unit, separated thousands, a true minus sign.

GB means 10^9 bytes everywhere. GiB is not used.
"""

from __future__ import annotations

import math

MINUS = "−"
NOT_MEASURED = "not measured"

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TWO_DAYS, _THREE_YEARS = 2 * 86_400, 1_000 * 86_400


def fixed(value: float, decimals: int) -> str:
    """Format with fixed decimals, separated thousands, a true minus sign, and never minus zero."""
    text = f"{abs(value):,.{decimals}f}"
    negative = value < 0 and any(digit in text for digit in "123456789")
    return (MINUS if negative else "") + text


def short(value: float, digits: int = 3) -> str:
    """Format with about ``digits`` significant digits and no exponent: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0 or not math.isfinite(value):
        return fixed(value, 0) if value == 0 else str(value)
    rounded = float(f"{value:.{digits - 1}e}")  # round before counting digits: 9.996 becomes 10.0, not 10.00
    return fixed(value, max(0, digits - 1 - math.floor(math.log10(abs(rounded)))))


def si(value: float, unit: str = "", digits: int = 3) -> str:
    """Format with an SI prefix from 1,000 on: ``si(3.1e14, "FLOP")`` → ``310 TFLOP``.

    Numbers without a unit are counts, of which 10^9 are "B" (billion).
    """
    for scale, prefix in _SI:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            prefix = "B" if prefix == "G" and not unit else prefix
            return f"{short(value / scale, digits)} {prefix}{unit}"
    whole = float(value).is_integer()
    return f"{fixed(value, 0) if whole else short(value, digits)}{' ' if unit else ''}{unit}"


def nbytes(value: float) -> str:
    """Format bytes with a decimal prefix: 812 GB."""
    return si(value, "B")


def duration(seconds: float) -> str:
    """Format a duration: 12 ms, 0.4 s, 41 s, 6 min 12 s, 1 h 02 min, 3.5 days, 12 years."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{fixed(seconds, 1)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if seconds < _TWO_DAYS:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    days = seconds / 86_400
    return f"{days:,.1f} days" if seconds < _THREE_YEARS else f"{days / 365.25:,.0f} years"


def is_share(unit: str) -> bool:
    """Return whether values of this unit are fractions of 1. They are shown in percent."""
    return unit.lower() in {"fraction", "share", "accuracy", "ratio of 1"}


def format_value(value: float, unit: str, decimals: int | None = None) -> str:
    """Format a number without its unit, for a column whose header has it. Fractions become percent."""
    if is_share(unit):
        return fixed(100 * value, 1 if decimals is None else decimals)
    if unit == "%":
        return fixed(value, 1 if decimals is None else decimals)
    return short(value) if decimals is None else fixed(value, decimals)


def unit_name(unit: str) -> str:
    """Return the unit for a header: "%" for fractions, "" for plain ratios."""
    return "%" if is_share(unit) else "" if unit == "1" else unit
