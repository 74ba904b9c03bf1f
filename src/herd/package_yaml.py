"""Read the YAML files of the package, which hold the tables and texts of the code next to them."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # gives the same result ten times faster


def package_yaml(package: str, name: str) -> Any:
    """Return the contents of a file of a package: ``package_yaml(__package__, "names.yaml")``."""
    return yaml.load(resources.files(package).joinpath(name).read_text(encoding="utf-8"), Loader=_LOADER)
