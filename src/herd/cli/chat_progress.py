"""Show in a line of the terminal how much of a long prompt `herd chat` has read, until the answer begins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.chat_session import ChatEvent
    from ..engine.engine import Engine

    Ask = Callable[[str], Generator[ChatEvent, None, None]]

QUIET_SECONDS = 1.0
"""Time before the line appears. Short prompts are read by then."""


def with_progress(engine: Engine, ask: Ask) -> Ask:
    """Return ``ask`` with a line on stderr while it reads a prompt, if stdout and stderr are terminals."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return ask
    line = _Line()
    engine.on_prompt = line.update

    def asked(question: str) -> Generator[ChatEvent, None, None]:
        try:
            yield from ask(question)
        finally:  # after Ctrl-C and after an error too
            line.erase()

    return asked


class _Line:
    """The line with the progress. The cursor stays at its beginning, where the answer will begin."""

    def __init__(self) -> None:
        self._began, self._shown = 0.0, 0

    def update(self, n_read: int, n_tokens: int) -> None:
        if n_read == 0:
            self._began = monotonic()
        if n_read == n_tokens:
            self.erase()
        elif monotonic() - self._began >= QUIET_SECONDS:
            text = f"reading the prompt: {100 * n_read // n_tokens} % of {n_tokens:,} tokens"
            self._shown = len(text)
            print(text, end="\r", file=sys.stderr, flush=True)

    def erase(self) -> None:
        if self._shown:
            print(" " * self._shown, end="\r", file=sys.stderr, flush=True)
            self._shown = 0
