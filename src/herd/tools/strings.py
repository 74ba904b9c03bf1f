"""String tools: answers about letters. A language model sees tokens, not letters."""

from __future__ import annotations

from ..errors import ToolError


def reverse(text: str) -> str:
    """The text from back to front."""
    return text[::-1]


def upper(text: str) -> str:
    """The text in capital letters."""
    return text.upper()


def count_letter(text: str, letter: str) -> str:
    """How often a letter occurs in a text, capital and small letters told apart."""
    if len(letter) != 1:
        raise ToolError(f"count_letter: letter={letter!r}; give exactly one letter")
    return str(text.count(letter))
