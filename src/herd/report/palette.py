"""The colours of a report, in one place for the page (CSS variables) and for stand-alone pictures (written out).

One colour a model, the same everywhere: hues after Okabe and Ito's set, which colour-blind readers tell apart, and the
control grey, because it is what the student is compared with. Text never depends on colour alone.
"""

from __future__ import annotations

LIGHT: dict[str, str] = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1f2328",
    "soft": "#5b626b",
    "faint": "#8b919a",
    "line": "#e3e0d8",
    "grid": "#eceae4",
    "accent": "#2463a8",
    "good": "#1a7f4b",
    "bad": "#b3382c",
    "teacher": "#2463a8",
    "long": "#0f8f9c",
    "instruct": "#a2458f",
    "student": "#cf5a16",
    "control": "#7a8089",
    "other": "#8a6d1d",
    "none": "#b9b5aa",
}
DARK: dict[str, str] = {
    "paper": "#14171b",
    "card": "#1b1f24",
    "ink": "#e8e6e1",
    "soft": "#a8adb5",
    "faint": "#7d838c",
    "line": "#2e343b",
    "grid": "#272c32",
    "accent": "#6aa9ee",
    "good": "#57c08a",
    "bad": "#f08a7d",
    "teacher": "#6aa9ee",
    "long": "#4cc3cf",
    "instruct": "#d98bc8",
    "student": "#f5934f",
    "control": "#a2a8b1",
    "other": "#d3b45a",
    "none": "#565b61",
}

_MODELS = ("teacher", "long", "instruct", "student", "control")


def tone(model: str) -> str:
    """Name of the colour a model is drawn in: its own, or that of the kind its name begins or ends with."""
    lower = model.lower()
    return next(
        (known for known in reversed(_MODELS) if lower.startswith(known) or lower.endswith(known)), "other"
    )


def variables(colours: dict[str, str]) -> str:
    """As CSS declarations: ``--paper: #fbfaf7; ...``."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


CHART_CSS = """
svg text { font-family: var(--sans, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif);
  font-size: 12px; fill: var(--soft); }
svg .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 11px; }
svg .num { font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); font-weight: 600; }
svg .big { font-size: 14px; fill: var(--ink); font-weight: 650; }
svg .faint { fill: var(--faint); }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--none); stroke-width: 1; }
svg .bar { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; opacity: .55; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .38; }
svg .dash { stroke-dasharray: 5 4; }
svg .node { fill: var(--card); stroke-width: 1.5; }
svg .edge { fill: none; stroke: var(--none); stroke-width: 1.5; }
svg .tip { fill: var(--none); }
svg .cell { fill: var(--accent); }
svg .on { fill: var(--card); font-weight: 600; }
svg .off { fill: var(--ink); }
""".strip()
"""Classes that every chart uses; colours come from the variables above."""
