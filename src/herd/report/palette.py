"""The colours of reports, for pages (as CSS variables) and for stand-alone pictures (written out).

`palette.yaml` lists the colours, and `charts.css` is the style of charts. Text never depends on colour alone.
"""

from __future__ import annotations

from importlib import resources

from ..package_yaml import package_yaml

_PAIRS = package_yaml(__package__, "palette.yaml")
LIGHT: dict[str, str] = {name: light for name, (light, _) in _PAIRS.items()}
DARK: dict[str, str] = {name: dark for name, (_, dark) in _PAIRS.items()}
CHART_CSS = resources.files(__package__).joinpath("charts.css").read_text(encoding="utf-8")
_MODELS = ("control", "student", "instruct", "long", "teacher")


def tone(model: str) -> str:
    """Return the colour name of a model: the role that its name begins or ends with, or "other"."""
    lower = model.lower()
    return next((role for role in _MODELS if lower.startswith(role) or lower.endswith(role)), "other")


def variables(colours: dict[str, str]) -> str:
    """Return the colours as CSS declarations: ``--paper: #fbfaf7; ...``."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
