"""Search with a user's regular expression, for a limited time.

A pattern such as ``(a|aa)+$`` can take longer than the universe has existed. `regex` has the syntax of `re`
and stops.
"""

from __future__ import annotations

from typing import Literal

import regex

from ...errors import DataError

SECONDS = 2.0


def check_pattern(pattern: str, where: str = "") -> None:
    """Raise `DataError`, beginning with ``where``, if this is not a regular expression."""
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise DataError(f"{where}pattern {pattern!r} is not a regular expression ({error})") from None


def find(
    pattern: str, text: str, match: Literal["search", "fullmatch"] = "search"
) -> regex.Match[str] | None:
    """Return the match of a pattern, or None. Raises TimeoutError after `SECONDS`."""
    try:
        return getattr(regex, match)(pattern, text, timeout=SECONDS)
    except TimeoutError:
        raise TimeoutError(f"the pattern {pattern!r} takes longer than {SECONDS:g} s") from None
