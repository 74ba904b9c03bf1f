"""Format numbers for readers: few digits, a unit, separated thousands, a true minus sign.

GB means 10^9 bytes everywhere in reports. GiB is not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

NBSP = "\u00a0"
MINUS = "−"
NOT_MEASURED = "not measured"

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


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
    """Format with an SI prefix from 1,000 on: ``si(3.1e14, "FLOP")`` → ``310 TFLOP``."""
    for scale, prefix in _SI:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{short(value / scale, digits)}{NBSP}{prefix}{unit}"
    whole = float(value).is_integer()
    return f"{fixed(value, 0) if whole else short(value, digits)}{NBSP if unit else ''}{unit}"


def nbytes(value: float) -> str:
    """Format bytes with a decimal prefix: 812 GB."""
    return si(value, "B")


def duration(seconds: float) -> str:
    """Format a duration: 0.4 s, 41 s, 6 min 12 s, 1 h 02 min."""
    if seconds < 10:
        return f"{fixed(seconds, 1)}{NBSP}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


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


# fmt: off
LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "it": "Italian", "pt": "Portuguese", "hi": "Hindi",
    "es": "Spanish", "th": "Thai", "ja": "Japanese", "bn": "Bengali", "ru": "Russian", "sw": "Swahili",
    "te": "Telugu", "zh": "Chinese",
}
# fmt: on
"""The eight languages of Llama 3.1 in the order of its model card, then languages of the benchmarks."""


def in_order(codes: Iterable[str]) -> list[str]:
    """Return the codes without repeats, languages first, in the order of `LANGUAGES`."""
    known = {code: index for index, code in enumerate(LANGUAGES)}
    return sorted(dict.fromkeys(codes), key=lambda code: known.get(code, len(known)))


def language(code: str) -> str:
    """Return the English name of a language. Other codes, such as "code", are returned unchanged."""
    return LANGUAGES.get(code, code)
