"""Turn token ids into text as they arrive, without incomplete characters or beginnings of stop strings.

The tokenizer's stream decoder holds back unfinished UTF-8. Here, text that may become a stop string is held
back too, until the next tokens decide whether it does.
"""

from __future__ import annotations

from ..text.answers import overlap
from ..text.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """A decoder that takes ids one by one and returns the text that is certain: none without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()) -> None:
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self.stop_string: str | None = None
        """The stop string that is complete."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.stop_string is not None

    def feed(self, token_id: int) -> str:
        """Return the text that has become certain. Set ``stop_string`` when one is complete."""
        return "" if self._decoder is None else self._release(self._decoder.feed(token_id))

    def finish(self) -> str:
        """Return the text that was held back. A broken character at the end becomes U+FFFD."""
        if self.stopped or self._decoder is None:
            return ""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, piece: str) -> str:
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        matches = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if matches:  # the first to be complete, so that the division into pieces does not matter
            end, start = min(matches)
            self.stop_string, self._held = text[start:end], ""
            return text[:start]
        keep = max(overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
