"""Read what the user types or pastes in `herd chat`: a line is one question, and so is a pasted text.

Most terminals mark pasted text ("bracketed paste"), so that its line breaks do not end the input. From those
that do not, the lines of a paste arrive at once, much faster than anybody types. Lines that are typed while
an answer is printed are read at the next prompts, one at each.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterator

PASTE_SECONDS = 0.05
"""Longest pause between the lines of a paste."""
MARK, DO_NOT_MARK = "\x1b[?2004h", "\x1b[?2004l"
"""Tell the terminal to mark pasted text or not to. Readline sends them before and after it reads a line."""


def read_question(prompt: str) -> str:
    """Return a typed line or all lines of a pasted text. Raises what `input` raises.

    Of what arrived before the prompt was shown, one line is read.
    """
    remember = _line_editing()
    typed_ahead = _has_arrived(0)
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while not typed_ahead and not lines[0].startswith("/") and _has_arrived(PASTE_SECONDS):
            lines.append(input())
    question = "\n".join(lines)
    if question.strip():
        remember(question)
    return question


@contextlib.contextmanager
def marked_pastes() -> Iterator[None]:
    """Let the terminal mark text that is pasted while an answer is printed, so that it is one question."""
    library = getattr(sys.modules.get("readline"), "__doc__", None) or ""  # some Pythons have libedit instead
    reads_marks = "GNU readline" in library and os.environ.get("TERM") != "dumb"
    if not (reads_marks and sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    print(MARK, end="", flush=True)
    try:
        yield
    finally:
        print(DO_NOT_MARK, end="", flush=True)


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


def _has_arrived(seconds: float) -> bool:
    """Return whether characters arrive from the terminal within ``seconds``, even if not a whole line."""
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
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, old)
