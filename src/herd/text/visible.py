"""Make control characters visible, so that text in a terminal cannot act on it."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Return the text with control characters escaped (``\\x1b``), except line breaks and tabs.

    A model's text could otherwise move the cursor, change colours or rename the terminal's window.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
