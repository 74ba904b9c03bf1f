"""Notice that an answer has begun to repeat one passage without end, as small models do at low temperatures.

vLLM can stop on a pattern of tokens that occurs a given number of times in a row, and Ollama stops on 100
equal tokens. Its first limit of 30 cut off tables of contents and rows of emoji that users had asked for. So
a passage must fill many tokens here, however short it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MAX_PASSAGE = 200
"""Tokens of the longest passage that is looked for."""
MIN_TOKENS = 128
"""Tokens that all copies must have together. Rows of zeros or dashes that mean something are shorter."""


class RepetitionWatch:
    """Watches the tokens of an answer for a passage that is repeated ``limit`` times in a row (0: never)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._recent = deque[int](maxlen=MAX_PASSAGE)
        self._runs: dict[int, int] = {}
        """The number of latest tokens that equal the token p places before them, by p."""

    def feed(self, ids: Iterable[int]) -> bool:
        """Add tokens. Return whether the answer now ends with ``limit`` copies of a passage."""
        return any(self._add(id_) for id_ in ids)

    def _add(self, id_: int) -> bool:
        runs = self._runs
        self._runs = {
            place: runs.get(place, 0) + 1 for place, other in enumerate(self._recent, 1) if other == id_
        }
        self._recent.appendleft(id_)
        return self._limit > 0 and any(
            run + place >= max(self._limit * place, MIN_TOKENS) for place, run in self._runs.items()
        )
