"""The one jinja environment of all pages: everything escaped, nothing undefined, the house's style at hand.

A template says ``:root { {{ light }} }``, ``{{ css }}`` and ``{% include "page.css" %}``, and looks like the others.
"""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from .palette import CHART_CSS, DARK, LIGHT, tone, variables


@cache
def template(package: str, name: str) -> Template:
    """A template that lies in ``package``; it may include what lies here."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("herd.report", ".")]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {
        "tone": tone,
        "css": Markup(CHART_CSS),
        "light": Markup(variables(LIGHT)),
        "dark": Markup(variables(DARK)),
    }
    return environment.get_template(name)
