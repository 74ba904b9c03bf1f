"""Read what the user types or pastes at the prompt of `herd chat`: a pasted text is one question.

Most terminals mark pasted text ("bracketed paste"), so that its line breaks do not end the input. From those
that do not, the lines of a paste arrive at once, much faster than anybody types.
"""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable

PASTE_SECONDS = 0.05
"""Longest pause between the lines of a paste."""


def read_question(prompt: str) -> str:
    """Return a typed line or all lines of a pasted text. Raises what `input` raises."""
    remember = _line_editing()
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while not lines[0].startswith("/") and _more_has_arrived():
            lines.append(input())
    question = "\n".join(lines)
    if question.strip():
        remember(question)
    return question


def _line_editing() -> Callable[[str], None]:
    """Give `input` arrow keys, a history and bracketed paste, and return what adds to the history."""
    try:
        import readline
    except ImportError:  # this Python has none
        return lambda _: None
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    readline.parse_and_bind("tab: self-insert")  # instead of names of files
    readline.set_auto_history(False)
    return readline.add_history


def _more_has_arrived() -> bool:
    """Return whether the terminal has more characters, even if they are not a whole line yet."""
    try:
        import termios
    except ImportError:
        return False
    try:
        old = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # not a terminal
        return False
    by_character = [*old[:3], old[3] & ~termios.ICANON, *old[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, by_character)
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, old)
