"""Quantities as people write them: ``15.6T`` tokens, ``32k`` of context, ``16M`` a batch.

Tokens count in thousands (k, M, B or G, T). A context of ``32k`` is 32,768, as everybody means it: there k is
1,024.
"""

from __future__ import annotations

import re

from ..errors import PlanError

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def tokens(text: str, name: str = "tokens") -> int:
    """``15.6T`` → 15,600,000,000,000. PlanError naming the option."""
    return _positive(text, name, _SCALES)


def context(text: str, name: str = "context") -> int:
    """``128k`` → 131,072; ``8192`` → 8,192. PlanError naming the option."""
    return _positive(text, name, {"": 1, "k": 1024, "m": 1024**2})


def _positive(text: str, name: str, scales: dict[str, int]) -> int:
    match = re.fullmatch(r"\s*(-?[\d,_]*\.?\d+)\s*([a-zA-Z]?)\s*", text)
    if not match or match[2].lower() not in scales:
        example = "15.6T" if "t" in scales else "32k"
        raise PlanError(f"{name}={text!r} is not a number: write it like {example}")
    value = round(float(re.sub("[,_]", "", match[1])) * scales[match[2].lower()])
    if value < 1:
        raise PlanError(f"{name}={text!r} must be positive")
    return value


def seconds(text: str, name: str = "seconds") -> float:
    """``1s``, ``500ms``, ``2min`` → seconds. PlanError naming the option."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(ms|s|min|h)?\s*", text)
    if not match:
        raise PlanError(f"{name}={text!r} is not a time: write it like 1s, 500ms or 2min")
    value = float(match[1]) * {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}[match[2] or "s"]
    if not value > 0:
        raise PlanError(f"{name}={text!r} must be positive")
    return value
