"""The map of the house is true: every room is on it, every file it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "src" / "herd").glob("*/__init__.py"))


def test_the_map_names_every_room_and_only_files_that_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \d \| `(\w+)/` \| (.*) \|$", text, re.MULTILINE))
    assert sorted(rows) == ROOMS
    for room, described in rows.items():
        for name in re.findall(r"`([\w/]+\.py)`", described):
            assert (ROOT / "src" / "herd" / room / name).exists(), f"design.md: {room}/{name}"
    for name in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (ROOT / "src" / "herd" / name).exists(), f"design.md: {name}"


def test_every_module_says_what_it_is_and_none_is_too_long():
    for path in (ROOT / "src" / "herd").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(('"""', 'r"""')), f"{path} has no docstring"
        assert text.count("\n") <= 600, f"{path} wants splitting"
