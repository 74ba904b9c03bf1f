"""Write the parts of SVG that charts need: elements, ticks, and labels that do not overlap.

Charts are text with CSS classes, so that one drawing serves light and dark mode, screen and print. A plotting
library would write fixed colours into the drawing, and its files have a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """Return an element with its attributes.

    In names, a trailing underscore is dropped (``class_``) and other underscores become hyphens. Numbers have
    at most two decimals. Attributes that are None are left out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text, quote=True)}"')
    head = " ".join(parts)
    return f"<{head}>{content}</{name}>" if content else f"<{head}/>"


def text(
    x: float, y: float, content: str, anchor: str | None = None, class_: str | None = None, **more: object
) -> str:
    """Return a line of text. ``x`` is its start (``anchor`` None), its "middle" or its "end"."""
    return tag("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_, **more)


def drawing(width: float, height: float, body: str, label: str, class_: str = "chart") -> str:
    """Return the whole picture. ``label`` describes it in words for readers who cannot see it."""
    size = {"viewBox": f"0 0 {width:g} {height:g}", "style": f"max-width: {width:g}px"}
    return tag("svg", tag("title", escape(label)) + body, role="img", class_=class_, aria_label=label, **size)


def path(points: Sequence[tuple[float, float]]) -> str:
    """Return the path data of a polyline."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` ticks in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    ticks: list[float] = []
    while (first + len(ticks)) * step <= high + 1e-9 * step:
        tick = (first + len(ticks)) * step
        ticks.append(min(max(tick, low), high))  # rounding may have left the range by a little
    return ticks


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten from ``low`` to ``high``.

    If they are few, also 3 times or 2 and 5 times them.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(ticks) >= 3:
            break
    return ticks


def decimals_for(ticks: Sequence[float]) -> int:
    """Return the number of decimals that distinguishes neighbouring ticks."""
    if len(ticks) < 2:
        return 2
    step = min(b - a for a, b in pairwise(ticks))
    wanted = max(0, -math.floor(math.log10(step) + 1e-9))
    return wanted if math.isclose(step * 10**wanted, round(step * 10**wanted)) else wanted + 1


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions so that neighbours are ``gap`` apart, in the same order and from ``low`` to ``high``."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [min(max(positions[index], low), high) for index in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(placed)
    for position, index in zip(placed, order, strict=True):
        result[index] = position
    return result


def text_width(content: str, size: float = 12.0) -> float:
    """Return the approximate width of a sans-serif text in pixels, in the widest of the common fonts."""
    return sum(size * (1.0 if ord(letter) > 0x2E7F else 0.64) for letter in content)
