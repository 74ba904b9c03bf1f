"""Load the templates of all pages. Values are escaped, and an undefined variable is an error.

A template says ``:root { {{ light }} }``, ``{{ css }}`` and ``{% include "page.css" %}`` to look like the
others.
"""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from .palette import CHART_CSS, DARK, LIGHT, tone, variables


@cache
def template(package: str, name: str) -> Template:
    """Return a template of ``package``. It may include files of ``herd.report``, such as ``page.css``."""
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
