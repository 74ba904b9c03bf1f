"""The structure of the code base: the map is true, files are small, names mean one thing, imports have no circles."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "herd"
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
MODULES = sorted(SOURCE.rglob("*.py"))


def test_the_map_names_every_room_and_only_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\*\*`(\w+)/`\*\*", text, re.MULTILINE))) == ROOMS
    for name in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (SOURCE / name).exists(), f"architecture.md names {name}, which does not exist"


def test_every_module_has_a_docstring_and_is_not_too_long():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(('"""', 'r"""')), f"{path} has no docstring"
        assert text.count("\n") <= 600, f"{path} is too long: split it"
