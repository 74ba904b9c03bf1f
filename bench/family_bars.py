"""The bars of bench/family.py, in a file without torch, because bench/readme.py judges the committed receipt by them."""

from __future__ import annotations

from herd.report.receipt import Value

BARS = {
    "tools_en": 0.70,
    "tools_worst_language": 0.50,
    "tools_worst_form": 0.65,
    "needle": 0.60,
    "copying": 0.95,
    "inside": 0.8,
    "outside": 0.8,
}
"""Smallest accepted mean of each fraction. No run may be 0.05 below it."""
TEXT_BAR = 2.47
"""Largest accepted bits per byte of the teacher."""
SECONDS_BAR = 600


def judged(key: str, mean: float, low: float, high: float) -> Value:
    """Return the mean of a figure over the runs, with the lowest and the highest run, and its verdict."""
    if key in BARS:
        bar = BARS[key]
        return Value(mean, "fraction", low, high, f"≥ {bar:g}", mean >= bar and low >= bar - 0.05)
    if key == "bpb_teacher":
        return Value(mean, "bits/byte", low, high, f"≤ {TEXT_BAR}", mean <= TEXT_BAR)
    if key == "seconds":
        return Value(mean, "s", low, high, f"≤ {SECONDS_BAR}", mean <= SECONDS_BAR)
    unit = "bits/byte" if key.startswith("bpb") else "1" if key == "predicted_over_measured" else "fraction"
    return Value(mean, unit, low, high)
